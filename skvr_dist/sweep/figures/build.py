"""What each figure shows of the methods of an experiment.

cache       loss against cache bytes per token; models of fewer layers, which keep all of their caches, on one line
retention   loss against the share of the layers that keep a cache
curves      loss over the tokens seen, at each retention
scaling     loss against the size of the model at each retention, fitted; only where a recipe has several sizes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np

from skvr_dist.sweep.figures.draw import Figure, Panel, Series
from skvr_dist.sweep.figures.read import Method
from skvr_dist.sweep.figures.statistics import SIZES_OF_POWER_LAW, Mean, fit_sizes, paired

LOSS = "held-out loss (nats per token)"
_INTERVALS = (
    "Losses are means over seeds in nats per token, with 95 % intervals of the mean by Student's t where there are "
    "several."
)
_MOST_CURVES = 4


def cache_figure(methods: Sequence[Method]) -> Figure:
    """Loss against cache bytes per token (the paper's Figure 5)."""
    shallow = _standard_by_depth(methods)
    own = [method for method in methods if method not in shallow or len(shallow) == 1]
    panels, rows = [], []
    for kind, title in _KINDS.items():
        panel = Panel(title, "cache bytes per token (bf16)", LOSS)
        for style, method in enumerate(methods):
            points = [(float(method.cache_bytes(name)), name) for name in _of_kind(method, kind)]
            if points and method in own:
                panel.series.append(_series(method, sorted(points), style))
        if len(shallow) > 1:
            at = [(float(method.cache_bytes("full")), Mean.of(method.losses("full"))) for method in shallow]
            means = [mean for _, mean in at]
            style = methods.index(shallow[0])
            panel.series.append(
                Series(
                    "standard models of fewer layers",
                    [x for x, _ in at],
                    [mean.value for mean in means],
                    [mean.half for mean in means],
                    style=style,
                )
            )
        if len(panel.series) > (len(shallow) > 1) or (kind == "every" and not own):
            panels.append(panel)
    for method in methods:
        for strategy in method.strategies:
            mean = Mean.of(method.losses(strategy))
            cells = [method.label, str(method.layers), strategy, f"{method.cache_bytes(strategy):,}", str(mean)]
            rows.append([*cells, str(mean.count)])
    header = ["method", "layers", "strategy", "cache bytes/token", "loss", "seeds"]
    return Figure("cache", "What a smaller key/value cache costs", panels, header, rows, [_INTERVALS])


def retention_figure(methods: Sequence[Method]) -> Figure:
    """Loss against retention (the paper's Figures 2 and 8)."""
    panels, rows = [], []
    deepest = [method for method in methods if len(method.strategies) > 1] or list(methods)
    for kind, title in _KINDS.items():
        panel = Panel(title, "layers that keep a cache (%)", LOSS, percent_x=True)
        for method in deepest:
            points = [(100 * method.retention(name), name) for name in _of_kind(method, kind)]
            if points:
                panel.series.append(_series(method, sorted(points), methods.index(method)))
        if panel.series:
            panels.append(panel)
    for method in deepest:
        standard = next((other for other in methods if other.is_standard and _same_model(other, method)), None)
        for strategy in method.strategies:
            share = f"{100 * method.retention(strategy):.3g} %"
            own = _price(method, strategy, method, "full") if strategy != "full" else None
            price = _price(method, strategy, standard, "full") if standard else None
            rows.append([method.label, strategy, share, str(Mean.of(method.losses(strategy))), _in_percent(own)])
            rows[-1].append(_in_percent(price))
    header = ["method", "strategy", "retention", "loss", "over its own full", "over standard at full"]
    notes = [_INTERVALS, "Differences are those of runs with the same seed."]
    return Figure("retention", "Loss with fewer and fewer caches", panels, header, rows, notes)


def curves_figure(methods: Sequence[Method]) -> Figure:
    """Loss over the tokens seen (the paper's Figure 6)."""
    strategies = _without_prefixes(methods)[:_MOST_CURVES]
    panels, rows = [], []
    for strategy in strategies:
        panel = Panel(f"cache strategy {strategy}", "tokens seen (millions)", LOSS)
        for style, method in enumerate(methods):
            if strategy not in method.strategies:
                continue
            means = {step: Mean.of(losses) for step, losses in method.losses_by_step(strategy).items()}
            if not means:  # no evaluation gave all seeds a loss
                continue
            panel.series.append(
                Series(
                    method.label,
                    [method.tokens_at(step) / 1e6 for step in means],
                    [mean.value for mean in means.values()],
                    [mean.half for mean in means.values()],
                    kind="band",
                    style=style,
                )
            )
            rows += [
                [method.label, strategy, str(step), f"{method.tokens_at(step):,}", str(mean)]
                for step, mean in means.items()
            ]
        if panel.series:
            panels.append(panel)
    header = ["method", "strategy", "step", "tokens", "loss"]
    return Figure("curves", "Loss during training", panels, header, rows, [_INTERVALS])


def scaling_figure(methods: Sequence[Method]) -> Figure | None:
    """Loss against the size of the model, fitted at each retention; None if no recipe has two sizes."""
    recipes: dict[str, list[Method]] = {}
    for method in methods:
        recipes.setdefault(method.recipe, []).append(method)
    grown = {_common_label(group): group for group in recipes.values() if len({m.parameters for m in group}) > 1}
    if not grown:
        return None
    strategies = _without_prefixes([group[0] for group in grown.values()])
    panels, rows, forms = [], [], set()
    for strategy in strategies:
        panel = Panel(f"cache strategy {strategy}", "parameters", LOSS, sizes_x=True)
        for style, (label, group) in enumerate(grown.items()):
            # Of methods of one size, such as the same run in two experiments, the first.
            by_size = {method.parameters: method for method in reversed(group) if strategy in method.strategies}
            having = [by_size[size] for size in sorted(by_size)]
            if len(having) < 2:
                continue
            losses = {method.parameters: method.losses(strategy) for method in having}
            fit = fit_sizes(losses)
            forms.add(fit.form)
            means = [Mean.of(values) for values in losses.values()]
            sizes = [float(size) for size in losses]
            line = np.geomspace(sizes[0], sizes[-1], 50)
            panel.series.append(Series(label, line.tolist(), fit.at(line).tolist(), [None] * 50, "fit", style))
            panel.series.append(
                Series(label, sizes, [mean.value for mean in means], [mean.half for mean in means], "marks", style)
            )
            for method, mean in zip(having, means, strict=True):
                rows.append(
                    [label, strategy, f"{method.parameters:,}", str(mean), _price_of_size(method, methods, strategy)]
                )
            rows.append([label, strategy, "fit", fit.in_words(), ""])
        if panel.series:
            panels.append(panel)
    notes = [_INTERVALS, *(_FORMS[form] for form in sorted(forms))]
    header = ["recipe", "strategy", "parameters", "loss", "over standard at full, same size"]
    return Figure("scaling", "Loss and the size of the model", panels, header, rows, notes)


_FORMS = {
    "log": f"Fits are a + b ln N over N parameters, because there are fewer than {SIZES_OF_POWER_LAW} sizes; brackets "
    f"hold 95 % intervals by a bootstrap over the seeds of each size.",
    "power": "Fits are a + b N^-c over N parameters; brackets hold 95 % intervals by a bootstrap over the seeds of "
    "each size.",
}
FIGURES: dict[str, Callable[[Sequence[Method]], Figure | None]] = {
    "cache": cache_figure,
    "retention": retention_figure,
    "curves": curves_figure,
    "scaling": scaling_figure,
}


_KINDS = {
    "every": "every G-th layer keeps a cache",
    "prefix": "the first M layers keep a cache",
    "other": "other layers keep a cache",
}


def _of_kind(method: Method, kind: str) -> list[str]:
    """The strategies that keep every G-th layer, the first M, or others; with full retention, which is one of each.

    Full retention alone is drawn among the first.
    """
    kinds = {name: each if (each := name.partition(":")[0]) in _KINDS else "other" for name in method.strategies}
    found = [name for name in kinds if name == "full" or kinds[name] == kind]
    return found if kind == "every" or found != ["full"] else []


def _without_prefixes(methods: Sequence[Method]) -> list[str]:
    """All strategies but those that keep the first M layers, which are drawn only where there are no others."""
    names = list(dict.fromkeys(name for method in methods for name in method.strategies))
    return [name for name in names if not name.startswith("prefix")] or names


def _series(method: Method, points: Sequence[tuple[float, str]], style: int) -> Series:
    means = [Mean.of(method.losses(strategy)) for _, strategy in points]
    x = [place for place, _ in points]
    return Series(method.label, x, [mean.value for mean in means], [mean.half for mean in means], style=style)


def _standard_by_depth(methods: Sequence[Method]) -> list[Method]:
    """Models without routing that differ in depth alone, the deepest of all methods first."""
    deepest = max(methods, key=lambda method: method.layers)
    width = {key: value for key, value in deepest.config["model"].items() if key != "num_hidden_layers"}
    of_width = [
        method
        for method in methods
        if method.is_standard
        and "full" in method.strategies
        and {key: value for key, value in method.config["model"].items() if key != "num_hidden_layers"} == width
    ]
    return sorted({method.layers: method for method in of_width}.values(), key=lambda method: -method.layers)


def _same_model(one: Method, other: Method) -> bool:
    return one.config["model"] == other.config["model"]


def _price(method: Method, strategy: str, reference: Method, reference_strategy: str) -> Mean | None:
    """By how much a method's loss exceeds another one's, in percent, seed by seed."""
    if reference_strategy not in reference.strategies:
        return None
    return paired(_by_seed(method, strategy), _by_seed(reference, reference_strategy))


def _price_of_size(method: Method, methods: Sequence[Method], strategy: str) -> str:
    standard = next((other for other in methods if other.is_standard and _same_model(other, method)), None)
    return _in_percent(_price(method, strategy, standard, "full")) if standard else ""


def _by_seed(method: Method, strategy: str) -> dict[int, float]:
    return {int(run["seed"]): float(run["held_out"][strategy]) for run in method.runs}


def _in_percent(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.value:+.2f}" + ("" if mean.half is None else f" ± {mean.half:.2f}") + " %"


def _common_label(group: Sequence[Method]) -> str:
    """The words that the names of some methods have in common at their end or beginning; without any, all names."""
    names = [method.label.split("-") for method in group]
    end = _common_words([name[::-1] for name in names])[::-1]
    return "-".join(end or _common_words(names)) or ", ".join(method.label for method in group)


def _common_words(names: Sequence[Sequence[str]]) -> list[str]:
    """The first words of all names, as far as they are the same."""
    return [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False))]
