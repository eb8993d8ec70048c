"""deepstack_pl: when, where and how feeding visual tokens into inner layers helps a vision-language model."""
