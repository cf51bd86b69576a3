"""A rank of `test_mesh.py` for several layouts in one launch, and its verdict on a wrong loss."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "moe_exp"))
from test_mesh import TOLERANCES, Layout, compare, run_config, run_layout, train
from utils import init_distributed, print_by_rank, run

from dmoe.errors import RunError

LAYOUTS = [
    Layout(dp=1, shard=2, tp=1, ep=1, loss_parallel=True, small=True),
    Layout(dp=2, shard=1, tp=1, ep=1, loss_parallel=True, small=True),
    Layout(dp=1, shard=1, tp=2, ep=1, loss_parallel=True, small=True),
    Layout(dp=1, shard=2, tp=1, ep=2, loss_parallel=True, small=True),
    Layout(dp=1, shard=1, tp=2, ep=2, loss_parallel=False, small=True),
]


def main() -> None:
    _, _, device = init_distributed()
    for layout in LAYOUTS:
        run_layout(layout, device, verify=True)
    config = run_config(LAYOUTS[0])
    right = train(config, device, None)
    for field, tolerance in TOLERANCES.items():
        wrong = [*right[:-1], replace(right[-1], **{field: getattr(right[-1], field) * (1 + 2 * tolerance)})]
        try:
            compare(wrong, config, device)
        except RunError as error:
            print_by_rank(f"wrong {field} refused: {error}")


if __name__ == "__main__":
    run(main)
