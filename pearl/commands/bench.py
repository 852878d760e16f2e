"""`pearl bench`: what this machine makes of models of known shapes: no network, no checkpoint, under ten minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pearl.config import cli, outputs
from pearl.config.engine_config import DTYPES
from pearl.config.inputs import brief
from pearl.config.synthetic import SyntheticDraft
from pearl.errors import UsageError

SHAPES = ("0.5B", "1B", "8B", "14B", "32B")


def parser() -> cli.Parser:
    made = cli.Parser(
        "bench",
        "",
        "--shapes 1B 8B --seconds 200",
        "--shapes tiny --device cpu",
        "--shapes 8B --draft synthetic:0.8@5ms",
    )
    made.add_argument("--shapes", nargs="+", default=list(SHAPES), help=f"tiny, or some of {', '.join(SHAPES)}")
    made.add_argument("--device", help="default: cuda:0, or cpu where there is none")
    made.add_argument("--dtype", default="bfloat16", choices=DTYPES, help=", ".join(DTYPES))
    made.add_argument(
        "--draft",
        metavar="synthetic:...",
        help="a draft that is told how often to be right, and how long a forward takes, as synthetic:0.9,0.8,0.7@5ms",
    )
    made.add_argument("--seconds", type=float, default=540.0, help="after which no further shape is begun")
    made.add_argument(
        "--output", metavar="DIR", type=outputs.folder, default="results/gpu_bench", help="of bench.json and bench.md"
    )
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if found.draft is not None and SyntheticDraft.of(found.draft) is None:
        raise UsageError(f"Shapes have no drafter, so --draft must be like synthetic:0.8@5ms, not {found.draft!r}.")
    if not found.seconds >= 0:
        raise UsageError(f"--seconds must be a number from 0, not {found.seconds:g}.")

    import torch

    from pearl.bench.shapes import bench, markdown, named

    device = found.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} can't be used here ({brief(error, 120)}): name cpu or cuda:0.") from None

    def keep(result: dict[str, Any]) -> None:
        shapes = [{**one, "plan": vars(one["plan"])} for one in result["shapes"]]
        outputs.write_json(found.output / "bench.json", {**result, "shapes": shapes})
        outputs.write(found.output / "bench.md", markdown(result))

    result = bench(named(found.shapes), device, found.dtype, found.seconds, keep, found.draft)
    keep(result)
    print(markdown(result), end="")
    return 0
