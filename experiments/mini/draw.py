"""Write the answers here: ``python experiments/mini/draw.py outputs/sweeps/SWEEP ...``, sweeps of experiment=mini/NAME.

For each NAME.md, the report's tables, and NAME.png: accuracy, learning curves.
"""

import sys
from pathlib import Path

from deepstack_pl.cli.arms import fairness
from deepstack_pl.cli.study import read_study
from deepstack_pl.cli.study_charts import by_arm, learning, over
from deepstack_pl.cli.study_page import costs_of, markdown, table_of

HERE = Path(__file__).parent


def main(folders: list[Path]) -> None:
    for folder in folders:
        study = read_study([folder])
        name = next(w.partition("mini/")[2] for w in study.arms[0].one["arm"] if w.startswith("experiment=mini/"))
        tables = [table_of(study, kind) for kind in study.kinds] + [costs_of(study)]
        checks = fairness([run for arm in study.arms for run in arm.runs.values()])
        (HERE / f"{name}.md").write_text(markdown(study, tables, checks), encoding="utf-8")
        accuracy = over(study, study.swept) if study.swept else by_arm(study)
        accuracy.savefig(HERE / f"{name}.png", dpi=90)
        learning(study).savefig(HERE / f"{name}_curves.png", dpi=90)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
