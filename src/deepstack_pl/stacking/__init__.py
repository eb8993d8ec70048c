"""Plans and the pure tensor arithmetic behind them."""
