"""What must hold of the kernels and of the predictions, from gates.json.

    {"kernels": [{"match": "regex of a kernel's name", "arch": "regex", "why": "...",
                  "limits": {"metric": ["<=", 12]}}],
     "predictions": [{"where": {"device": ["H100"], "M": [1, 8, 16]}, "why": "...",
                      "limits": {"times_dense": [">=", 3.1]},
                      "targets": {"times_dense": [">=", 3.1]}}]}

A limit that does not hold fails; so does a gate that matches nothing, or a metric that is not
there. A target that is missed is reported, not failed: it says what is aimed at where a limit
says what was attained.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .assumptions import DEVICES

Facts = Mapping[str, Any]
"""Of one kernel, or of one prediction."""

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
}


class Verdict(NamedTuple):
    failures: list[str]
    missed: list[str]
    checked: int


def _broken(facts: Facts, limits: Mapping[str, Sequence[Any]], label: str) -> list[str]:
    broken = []
    for metric, (comparison, wanted) in limits.items():
        value = facts.get(metric)
        if value is None:
            broken.append(f"{label}: no {metric} is known, wanted {comparison} {wanted}")
        elif not COMPARE[comparison](value, wanted):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            broken.append(f"{label}: {metric} is {shown}, wanted {comparison} {wanted}")
    return broken


def _check(
    gates: Sequence[Facts],
    subjects: Sequence[Facts],
    matches: Callable[[Facts, Facts], bool],
    label: Callable[[Facts], str],
) -> Verdict:
    failures: list[str] = []
    missed: list[str] = []
    checked = 0
    for gate in gates:
        found = [facts for facts in subjects if matches(gate, facts)]
        if not found:
            asked = {k: v for k, v in gate.items() if k in ("match", "arch", "where")}
            failures.append(f"the gate {asked} matches nothing")
        for facts in found:
            failures += _broken(facts, gate.get("limits", {}), label(facts))
            missed += _broken(facts, gate.get("targets", {}), label(facts))
            checked += len(gate.get("limits", {}))
    return Verdict(failures, missed, checked)


def for_archs(gates: Facts, archs: Sequence[str]) -> Facts:
    """The gates that these architectures can answer: those of others are not asked."""
    devices = {d.name for d in DEVICES if any(d.arch[:-1] == arch[:-1] for arch in archs)}

    def answered(gate: Facts) -> bool:
        if "where" in gate:
            return bool(devices & set(gate["where"]["device"]))
        return any(re.fullmatch(gate.get("arch", ".*"), arch) for arch in archs)

    return {kind: [g for g in listed if answered(g)] for kind, listed in gates.items()}


def _kernel_matches(gate: Facts, kernel: Facts) -> bool:
    return bool(
        re.search(gate["match"], kernel["name"])
        and re.fullmatch(gate.get("arch", ".*"), kernel["arch"])
    )


def _prediction_matches(gate: Facts, prediction: Facts) -> bool:
    return all(prediction[key] in allowed for key, allowed in gate["where"].items())


def check_kernels(gates: Facts, kernels: Sequence[Facts]) -> Verdict:
    return _check(
        gates["kernels"], kernels, _kernel_matches, lambda k: f"{k['arch']} {k['name']}"
    )


def check_predictions(gates: Facts, predictions: Sequence[Facts]) -> Verdict:
    def label(p: Facts) -> str:
        axis = f"axis {p['axis']} " if "axis" in p else ""
        return f"{p['device']} {p['operation']} {axis}{p['N']}x{p['K']} M = {p['M']}"

    return _check(gates["predictions"], predictions, _prediction_matches, label)
