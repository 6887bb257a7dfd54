"""Measure foveal: ``python -m benchmarks`` prints the tables and writes them as JSON.

Every table is measured in paired rounds: the contenders take turns, so that a noisy machine slows all of them alike.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import measure, models, operations


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=("all", "op", "model"), default="all", help="which tables (default: all)")
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=here, help="one device (default: the CPU and, where there is one, the GPU)")
    parser.add_argument("--variant", default="transnext_tiny", help="that beside the peers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds of each table (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: all cores)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="at model level, the tables whose title has this text"
    )
    parser.add_argument("--no-peers", action="store_true", help="foveal and the floor only")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command out")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark.json"), help="JSON (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    report: dict = {"machine": measure.machine("cpu"), "rounds": given.rounds, "rows": []}
    if torch.cuda.is_available():
        report["machine"]["gpu"] = torch.cuda.get_device_name()
    print("  ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    levels = [level for name, level in (("op", _op_level), ("model", _model_level)) if given.level in ("all", name)]
    for device in [given.device] if given.device else here:
        for level in levels:
            for row in level(given, device):
                report["rows"].append(row)  # written at once: a long run that ends early keeps what it has
                given.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {given.output}")


def _op_level(given: argparse.Namespace, device: str) -> Iterator[dict]:
    print(f"\n{device}")
    print(
        f"{'op':<22}{'stage':<24}{'mode':<10}{'dtype':<10}{'ms':>9}{'reference':>11}{'ratio':>7}{'copies':>8}"
        + ("" if device == "cpu" else f"{'FlexAttention':>15}")
    )
    for stage in operations.STAGES[2:3] if given.quick else operations.STAGES:
        for dtype in ("float32", "bfloat16"):
            for training in (False, True):
                batch = (1 if "800" in stage.name else 8) * (1 if device == "cpu" or given.quick else 16)
                for row in operations.run(
                    stage, batch=batch, dtype=dtype, device=device, training=training, rounds=given.rounds
                ):
                    yield row
                    mode = "training" if training else "forward"
                    peer = (
                        f"{row['times_flex']:>14.1f}x"
                        if "times_flex" in row
                        else row.get("flex_failed", "").partition("\n")[0][:70]
                    )
                    print(
                        f"{row['name']:<22}{row['stage']:<24}{mode:<10}{dtype:<10}{row['milliseconds']:>9.2f}"
                        f"{row['reference_milliseconds']:>11.2f}{row['times_the_reference']:>6.1f}x"
                        f"{row['copies_of_its_bytes']:>8.1f}{peer}",
                        flush=True,
                    )


def _model_level(given: argparse.Namespace, device: str) -> Iterator[dict]:
    for case in models.cases(given.variant, device, given.quick):
        if given.only not in case.title:
            continue
        print(f"\n{case.title}")
        print(f"{'':<36}{'images/s':>10}{'ms':>10}{'of floor':>10}{'foveal is':>11}{'peak MB':>10}")
        peers = not given.no_peers and case.variant == given.variant
        for row in models.run(case, rounds=given.rounds, peers=peers):
            yield row
            if "failed" in row:
                print(f"{row['name']:<36}{row['failed'][:70]:>10}", flush=True)
                continue
            memory = f"{row['peak_bytes'] / 1e6:>10.0f}" if "peak_bytes" in row else f"{'':>10}"
            print(
                f"{row['name']:<36}{row['images_per_second']:>10.2f}{row['milliseconds']:>10.1f}"
                f"{row['of_linear_floor']:>10.2f}{row['foveal_is_times']:>10.2f}x{memory}",
                flush=True,
            )


if __name__ == "__main__":
    main()
