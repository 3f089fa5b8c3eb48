"""Predicted times of products on an H100 and an A100 beside their floors, from sass.json. Never measured.

python tests/gpu_compile/predict.py [--out FILE]         writes tests/gpu_compile/predicted.json, or FILE
python tests/gpu_compile/predict.py --table H100         prints a table instead
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kernel_gates.architectures import GPUS
from kernel_gates.prediction import ROUTES, ROWS, Row, rows

FOLDER = Path(__file__).parent
RECORD, PREDICTED = FOLDER / "sass.json", FOLDER / "predicted.json"
WHAT = (
    "Predicted, never measured: from the instructions counted in sass.json, the launch plans, and published peaks "
    "(kernel_gates/architectures.py, prediction.py). Microseconds."
)


def predicted() -> dict[str, Any]:
    """What predicted.json holds: a list for each product, in the order of `columns`."""
    figures = json.loads(RECORD.read_text())["kernels"]
    columns = ["gpu", "direction", "in", "out", "rows", "route", "splits", "bound", "floor", *ROUTES]
    return {"what": WHAT, "columns": columns, "rows": [_cells(row) for row in rows(figures)]}


def _cells(row: Row) -> list[Any]:
    chosen = row.times[row.route]
    times = [_microseconds(row.times[route].seconds) for route in ROUTES]
    place = [row.gpu, row.direction, row.in_features, row.out_features, row.rows]
    return [*place, row.route, chosen.splits, chosen.bound, _microseconds(row.floor), *times]


def _microseconds(seconds: float) -> float:
    return float(f"{seconds * 1e6:.3g}")


def table(gpu: str) -> str:
    """Markdown: the predicted time by the chosen route / the floor."""
    data = predicted()
    found: dict[tuple[str, int, int], list[str]] = {}
    for cells in data["rows"]:
        row = dict(zip(data["columns"], cells, strict=True))
        if row["gpu"] == gpu:
            place = found.setdefault((row["direction"], row["in"], row["out"]), [])
            place.append(f"{row[row['route']]:g} / {row['floor']:g}")
    lines = [f"| {gpu}, predicted | " + " | ".join(f"M={m}" for m in ROWS) + " |", "|---" * (len(ROWS) + 1) + "|"]
    lines += [f"| {d} {k}x{n} | {' | '.join(times)} |" for (d, k, n), times in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PREDICTED)
    parser.add_argument("--table", choices=GPUS)
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    data = predicted()
    lines = ",\n".join(f" {json.dumps(row)}" for row in data["rows"])
    head = f'"what": {json.dumps(data["what"])},\n"columns": {json.dumps(data["columns"])}'
    options.out.write_text(f'{{{head},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
