"""What a cheaper predictive costs and loses: the frontier of docs/predictive_cost.md.

    python benchmarks/predictive.py --case NAME ADAPTER TEST [OUT_OF_SCOPE] --case ... --cache FOLDER --plot FILE

A case is an adapter with rows (jsonl): of a classifier texts and a label, and perhaps rows that belong to no
class; of multiple choice question, choices and label; of a summarizer dialogue and summary, whose every token is scored
after those before it. Cases of one name are seeds of one setting. `--student STUDENT ...` are what `blob distil` has
made of the adapters, in the order of the cases: one forward each. What a case's networks predict is kept in FOLDER: a
run that was stopped goes on, and the tables are made again without a model. The costs are counted in plain forwards,
and measured in processor time, which other processes on the machine change less than the clock.

Every way of predicting is scored on as many disjoint or random sets of samples as there are, so that its row is its
expectation. The reference is the average of all networks that were drawn, 100 or more.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from frontier.cases import DRAWN, Case, ask, collect, load, tiny
from frontier.ways import markdown, measured, plot, table_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", action="append", default=[], help="NAME ADAPTER TEST [OUT_OF_SCOPE]")
    parser.add_argument("--student", nargs="+", default=[], help="what was distilled of each case's adapter")
    parser.add_argument("--cache", default="predictive_cost", help="folder for what the networks predict")
    parser.add_argument(
        "--closed_form", action="store_true", help="also the linearised network: a backward pass a class"
    )
    parser.add_argument("--networks", type=int, default=100, help="drawn together by all ways, at least")
    parser.add_argument(
        "--trunks", type=int, nargs="+", help="in how many last layers samples differ; default: 1, 2, ... of all"
    )
    parser.add_argument("--collect_only", action="store_true", help="no tables")
    parser.add_argument("--plot", help="file for the picture")
    parser.add_argument("--tiny", action="store_true", help="a model not worth measuring: to see that this runs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = Path(tempfile.mkdtemp() if args.tiny else args.cache)
    cache.mkdir(parents=True, exist_ok=True)
    settings: dict[str, list[Case]] = defaultdict(list)
    students = args.student
    if students and len(students) != len(args.case):
        parser.error(f"{len(args.case)} cases have {len(students)} students; name one for each, in their order")
    for name, *files in [["tiny"]] if args.tiny else args.case:
        case = Case(name, Path(cache, f"{name}-{len(settings[name]) + 1}.npz"))
        settings[name].append(case)
        wanted = args.trunks or range(1, case.layers if case.kept else 2)
        if not case.kept or set(wanted) - set(case.trunks):
            drawn = {draw: max(10, count * args.networks // 100) for draw, count in DRAWN.items()}
            tiny(case, args.trunks) if args.tiny else collect(case, *load(*files), drawn, args.closed_form, args.trunks)
        if students and "student" not in case.kept:
            ask(case, students[sum(map(len, settings.values())) - 1], files[1:])
    if args.collect_only:
        return
    tables = {name: table_of(cases) for name, cases in settings.items()}
    for name, table in tables.items():
        print(f"\n{name}, {len(settings[name])} adapter(s)\n\n{markdown(table)}")
    print(f"\nMeasured\n\n{measured([case for cases in settings.values() for case in cases])}")
    if args.plot:
        plot(tables, Path(args.plot))


if __name__ == "__main__":
    main()
