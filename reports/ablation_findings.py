"""What a grid shows, in plain sentences, each computed from the figures. `Code` stands between backticks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from recollect.reports.ablation_analysis import AblationAnalysis, Row
from recollect.reports.ablation_paper import comparisons, domain_order, paper_summary
from recollect.reports.ablation_rows import ends, signed
from recollect.reports.ablation_statistics import SeedInterval
from recollect.reports.findings import Finding
from recollect.reports.rows import shown

FEW_SEEDS = 3
REACH = "How far do these figures reach?"
SAME_TIME = 0.05


def findings(analysis: AblationAnalysis) -> tuple[Finding, ...]:
    """The findings, the grid's own question first. What the figures cannot answer is left out."""
    answers = [(analysis.ablation.question, _headline(analysis))]
    answers += [
        ("Does training with an index teach the model to bear its errors?", _pairs(analysis)),
        ("What does age do to the keys?", _staleness(analysis)),
        ("What do indexes find among these keys?", _recall(analysis)),
        ("Does it train steadily?", _stability(analysis)),
        ("What does it cost?", _cost(analysis)),
        ("Does it agree with the paper?", _paper(analysis)),
        (REACH, _reach(analysis)),
        ("Is anything missing?", _missing(analysis)),
    ]
    return tuple(Finding(question, answer) for question, answer in answers if answer)


def headline(analysis: AblationAnalysis) -> str:
    """The answer to the grid's question."""
    return _headline(analysis) or "Nothing was measured yet."


def _headline(analysis: AblationAnalysis) -> str:
    several = len(analysis.ablation.sections) > 1
    parts = []
    for section in analysis.ablation.sections:
        text = _best(analysis, analysis.of(section))
        if text:
            parts.append(f"On {section}: {text}" if several else text)
    return " ".join(parts)


def _best(analysis: AblationAnalysis, rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.percent is not None]
    references = {row.reference for row in compared}
    if not compared or len(references) != 1:
        ranked = sorted((row for row in rows if row.perplexity), key=lambda r: r.perplexity.estimate)  # type: ignore[union-attr]
        if not ranked:
            return ""
        listed = ", ".join(f"`{r.name}` {shown(r.perplexity.estimate, 2)}" for r in ranked if r.perplexity)
        return f"Perplexity, from the lowest: {listed}."
    (reference,) = references
    base = next((row for row in rows if row.name == reference), None)
    level = f" ({shown(base.perplexity.estimate, 2)})" if base and base.perplexity else ""
    better = sorted((r for r in compared if _sign(r.percent) < 0), key=lambda r: _estimate(r.percent))
    worse = sorted((r for r in compared if _sign(r.percent) > 0), key=lambda r: -_estimate(r.percent))
    open_ = [r for r in compared if not _sign(r.percent)]
    total = f"{len(compared)} {'variant' if len(compared) == 1 else 'variants'}"
    text = (
        f"Against `{reference}`{level}, of {total} {len(better) or 'none'} {_is(better)} clearly lower in perplexity, "
    )
    text += f"{len(worse) or 'none'} clearly higher, {len(open_) or 'none'} undecided (the interval contains 0)."
    if better:
        text += f" The lowest is {_told(better[0])}."
    elif open_:
        lowest = min(open_, key=lambda r: _estimate(r.percent))
        if _estimate(lowest.percent) < 0:
            text += f" The lowest is {_told(lowest)}, one of the undecided."
    if worse:
        text += f" The highest is {_told(worse[0])}."
    if 0 < len(open_) <= 6 and (better or worse):
        text += f" Undecided: {', '.join(f'`{r.name}`' for r in open_)}."
    return text


def _is(rows: Sequence[Row]) -> str:
    return "are" if len(rows) > 1 else "is"


def _told(row: Row) -> str:
    perplexity = shown(row.perplexity.estimate, 2) if row.perplexity else "?"
    return f"`{row.name}` at {perplexity} ({_percent(row.percent)})"


def _percent(value: SeedInterval | None, digits: int = 1) -> str:
    if value is None:
        return "not comparable"
    between = ends(value, digits)
    return f"{signed(value.estimate, digits)} %" + (f"; 95 % interval {between}" if between else "; no interval")


def _sign(value: SeedInterval | None) -> int:
    return 0 if value is None else value.sign


def _estimate(value: SeedInterval | None) -> float:
    return 0.0 if value is None else value.estimate


def _stability(analysis: AblationAnalysis) -> str:
    parts = []
    diverged = [(row, row.diverged) for row in analysis.rows if row.diverged]
    if diverged:
        listed = ", ".join(
            f"`{row.name}` ({count} of {row.seeds} seeds{_on(analysis, row)})" for row, count in diverged
        )
        parts.append(f"These diverged: {listed}.")
    told = [row for row in analysis.measured if "spikes" in row.figures]
    if told and not diverged:
        parts.append("No training diverged.")
    spiking = sorted((r for r in told if r.figures["spikes"].estimate > 0), key=lambda r: -r.figures["spikes"].estimate)
    if told and not spiking:
        parts.append("No training had a loss spike.")
    elif spiking:
        most = spiking[0]
        parts.append(
            f"{len(spiking)} of {len(told)} variants had loss spikes, most `{most.name}`{_on(analysis, most)} with "
            f"{shown(most.figures['spikes'].estimate, 1)} a training."
        )
    apart = [r for r in told if _sign(r.differences.get("gradient_norm_max")) or _sign(r.differences.get("spikes"))]
    if apart:
        listed = ", ".join(f"`{r.name}`{_on(analysis, r)} ({_norms(r)})" for r in apart[:5])
        parts.append(f"Told apart from their reference by spikes or largest gradient norm: {listed}.")
    elif any("spikes" in row.differences and row.differences["spikes"].low is not None for row in told):
        parts.append("None is told apart from its reference by spikes or by its largest gradient norm.")
    return " ".join(parts)


def _norms(row: Row) -> str:
    told = []
    for name, words in (("spikes", "spikes"), ("gradient_norm_max", "largest norm")):
        difference = row.differences.get(name)
        if difference is not None and difference.sign:
            told.append(f"{words} {signed(difference.estimate, 1)}")
    return ", ".join(told)


def _on(analysis: AblationAnalysis, row: Row) -> str:
    return f" on {row.section}" if len(analysis.ablation.sections) > 1 else ""


def _cost(analysis: AblationAnalysis) -> str:
    """The variants with the largest and smallest step time against the reference, and the memory's bytes."""
    section = analysis.ablation.sections[0]
    timed = []
    for row in analysis.of(section):
        own, gap, ratio = row.figures.get("step_ms"), row.differences.get("step_ms"), row.figures.get("step_ratio")
        if ratio is not None:
            timed.append((ratio.estimate, row))
        elif own is not None and gap is not None and own.estimate > gap.estimate and gap.low != gap.high:
            timed.append((own.estimate / (own.estimate - gap.estimate), row))
    parts = []
    if timed:
        timed.sort(key=lambda pair: pair[0])
        (quick, first), (slow, last) = timed[0], timed[-1]
        if quick > 1 - SAME_TIME and slow < 1 + SAME_TIME:
            parts.append(f"No training step differs by more than {100 * SAME_TIME:.0f} % from that of its reference.")
        elif first is last:
            parts.append(f"A training step of `{last.name}` takes {slow:.2f} times that of its reference.")
        else:
            parts.append(
                f"Training steps take {quick:.2f} (`{first.name}`) to {slow:.2f} (`{last.name}`) times those of the "
                "reference."
            )
    kept = [row for row in analysis.of(section) if "memory_bytes" in row.figures]
    if kept:
        most = max(kept, key=lambda r: r.figures["memory_bytes"].estimate)
        least = min(kept, key=lambda r: r.figures["memory_bytes"].estimate)
        high, low = most.figures["memory_bytes"].estimate, least.figures["memory_bytes"].estimate
        if high > low:
            parts.append(
                f"The memory takes from {_bytes(low)} (`{least.name}`) to {_bytes(high)} (`{most.name}`) a sequence."
            )
        elif high:
            parts.append(f"The memory takes {_bytes(high)} a sequence in every variant.")
    return " ".join(parts)


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes" if count else "nothing"


def _pairs(analysis: AblationAnalysis) -> str:
    """Exact against approximate search while training and while evaluating: the interaction of the two."""
    parts = []
    for section in analysis.ablation.sections:
        by_pair: dict[tuple[str, str], Row] = {}
        for row in analysis.of(section):
            trained, evaluated = row.variant.value("training", "backend"), row.evaluation.get("backend")
            if isinstance(trained, str) and isinstance(evaluated, str) and evaluated != "none":
                by_pair.setdefault((trained, evaluated), row)
        for index in sorted({evaluated for _, evaluated in by_pair} - {"exact"}):
            cells = [
                by_pair.get(pair) for pair in (("exact", "exact"), ("exact", index), (index, "exact"), (index, index))
            ]
            if any(cell is None for cell in cells):
                continue
            ee, ei, ie, ii = (cell.name for cell in cells if cell is not None)
            untaught = analysis.compare(section, ei, ee)
            taught = analysis.compare(section, ii, ie)
            both = analysis.interaction(section, {ii: 1.0, ie: -1.0, ei: -1.0, ee: 1.0}, ee)
            if untaught is None or taught is None or both is None:
                continue
            word = {-1: "it does", 1: "it makes it worse", 0: "not to be told: the interval contains 0"}[both.sign]
            where = f" ({section})" if len(analysis.ablation.sections) > 1 else ""
            parts.append(
                f"Evaluated with `{index}` instead of exact search, a model trained with exact search changes by "
                f"{_percent(untaught, 2)}; one trained with `{index}` by {_percent(taught, 2)}. The difference between "
                f"the two is {_percent(both, 2)}: {word}{where}."
            )
    return " ".join(parts)


def _numbers(analysis: AblationAnalysis, prefix: str) -> list[tuple[Row, Mapping[str, SeedInterval]]]:
    found: list[tuple[Row, Mapping[str, SeedInterval]]] = []
    for row in analysis.measured:
        own = {name.removeprefix(prefix): v for name, v in row.probes.items() if name.startswith(prefix)}
        if own:
            found.append((row, own))
    return found


def _staleness(analysis: AblationAnalysis) -> str:
    parts = []
    for row, numbers in _numbers(analysis, "staleness_"):
        ages = {
            name.removeprefix("overlap_after_"): v for name, v in numbers.items() if name.startswith("overlap_after_")
        }
        told = []
        for age, overlap in ages.items():
            rise = numbers.get(f"perplexity_rise_percent_after_{age}")
            words = (
                f"after {age.replace('_', ' ')} old keys lead to {100 * overlap.estimate:.0f} % of the same neighbours"
            )
            told.append(words + (f" and perplexity changes by {signed(rise.estimate, 1)} %" if rise else ""))
        if told:
            parts.append(f"`{row.name}`{_on(analysis, row)}: {'; '.join(told)}.")
    return " ".join(parts)


def _recall(analysis: AblationAnalysis) -> str:
    found = _numbers(analysis, "index_recall_")
    parts = []
    for row, numbers in found:
        recalls = {name.removeprefix("recall_"): v for name, v in numbers.items() if name.startswith("recall_")}
        if recalls:
            listed = ", ".join(f"{name.replace('_', '-')} {v.estimate:.2f}" for name, v in recalls.items())
            spread = numbers.get("key_length_variation")
            lengths = f" (keys' lengths vary by {100 * spread.estimate:.0f} %)" if spread else ""
            parts.append(f"Recall in `{row.name}`{_on(analysis, row)}{lengths}: {listed}.")
    return " ".join(parts)


def _paper(analysis: AblationAnalysis) -> str:
    made = comparisons(analysis)
    return " ".join(part for part in (paper_summary(made), domain_order(analysis, made)) if part)


def _reach(analysis: AblationAnalysis) -> str:
    """What a reader must not read into the figures."""
    if not analysis.measured:
        return ""
    parts = []
    seeds = max(row.ok for row in analysis.measured)
    if seeds == 1:
        parts.append(
            "One seed was run: intervals speak of the text alone, and another seed may turn a small difference."
        )
    elif seeds <= FEW_SEEDS:
        parts.append(f"{seeds} seeds were run: their part of the intervals is rough, and wide for that reason.")
    whole = [row for row in analysis.measured if row.variant.kind != "fine-tune"]
    trained = [row.figures["training_tokens"].estimate for row in whole if "training_tokens" in row.figures]
    sizes = [row.figures["parameters"].estimate for row in analysis.measured if "parameters" in row.figures]
    if trained and sizes:
        parts.append(
            f"The models have {_millions(min(sizes), max(sizes))} parameters and read "
            f"{_millions(min(trained), max(trained))} tokens in training; the paper's have hundreds of times as many "
            "and train far longer. What holds here need not hold there."
        )
    compared = sum(row.percent is not None for row in analysis.measured)
    if compared >= 10:
        chance = round(compared / 20)
        parts.append(f"Each interval is taken by itself: of {compared} true zeros about {chance} would seem otherwise.")
    return " ".join(parts)


def _millions(low: float, high: float) -> str:
    def text(value: float) -> str:
        return f"{value / 1e6:.1f}"

    return f"{text(low)} million" if text(low) == text(high) else f"{text(low)} to {text(high)} million"


def _missing(analysis: AblationAnalysis) -> str:
    ablation = analysis.ablation
    total = len(ablation.sections) * len(ablation.variants) * len(ablation.seeds)
    counts: dict[str, int] = {}
    for section in ablation.sections:
        for variant in ablation.variants:
            for seed in ablation.seeds:
                row = ablation.rows.get((section, variant.name, seed))
                status = "missing" if row is None else row.status
                if status != "ok":
                    counts[status] = counts.get(status, 0) + 1
    if not counts:
        return ""
    words = {"missing": "not run yet", "diverged": "diverged", "failed": "failed", "skipped": "skipped"}
    listed = ", ".join(f"{count} {words[status]}" for status, count in counts.items())
    return f"Of {total} runs: {listed}. Their reasons stand at the end."
