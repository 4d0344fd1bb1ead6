"""Every public name says what it takes, what it raises and where its method comes from."""

import doctest
import importlib
import inspect
import re
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch

import hqqlora

PACKAGES = [
    "hqqlora",
    "hqqlora.autograd",
    "hqqlora.distributed",
    "hqqlora.gguf",
    "hqqlora.ops",
    "hqqlora.peft",
    "hqqlora.transformers",
]
# Functions with nothing of their own to refuse: any model is right.
REFUSES_NOTHING = {
    "find_nonfinite",
    "lora_parameters",
    "memory_report",
    "requantization_errors",
}
HEADER = Path(__file__).parents[1] / "c_api" / "hqqlora.h"


def public_names():
    """(package, name) of everything public, each object once."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if not name.startswith("__"):
                found.setdefault(id(getattr(module, name)), (package, name))
    return sorted(found.values())


@pytest.fixture(params=public_names(), ids=".".join)
def public(request):
    package, name = request.param
    return getattr(importlib.import_module(package), name)


def is_own(function):
    return inspect.isfunction(function) and function.__module__.startswith("hqqlora")


def methods_of(value):
    """The public methods that the package adds to a class: not those that it overrides, which
    are documented where they come from."""
    inherited = {
        name
        for base in value.__mro__[1:]
        if not base.__module__.startswith("hqqlora")
        for name in vars(base)
    }
    for name, member in vars(value).items():
        function = getattr(member, "__func__", member)
        if is_own(function) and not name.startswith("_") and name not in inherited:
            yield name, function


def documented_functions(value):
    """(name, docstring, parameters) of a function, or of a constructor and of the methods."""
    if not inspect.isclass(value):
        yield value.__name__, inspect.getdoc(value), parameters_of(value)
        return
    plain = is_dataclass(value) or issubclass(value, (Enum, tuple))  # its fields say it
    if not plain and is_own(value.__init__):
        text = f"{inspect.getdoc(value)}\n{value.__init__.__doc__}"
        yield value.__name__, text, parameters_of(value.__init__)
    for name, function in methods_of(value):
        yield f"{value.__name__}.{name}", inspect.getdoc(function), parameters_of(function)


def parameters_of(function):
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def undocumented(text, parameters):
    return {name for name in parameters if not re.search(rf"\b{name}\b", text or "")}


def test_everything_has_a_docstring(public):
    assert len(inspect.getdoc(public) or "") > 20


def test_every_parameter_is_explained(public):
    missing = {
        name: names
        for name, text, parameters in documented_functions(public)
        if (names := undocumented(text, parameters))
    }
    assert not missing


def functions_with_parameters():
    for package, name in public_names():
        value = getattr(importlib.import_module(package), name)
        if not inspect.isclass(value) and inspect.signature(value).parameters:
            yield value


@pytest.mark.parametrize("function", functions_with_parameters(), ids=lambda f: f.__name__)
def test_what_a_function_refuses_is_said(function):
    says = re.search(r"\bRaises\b", inspect.getdoc(function)) is not None
    assert says != (function.__name__ in REFUSES_NOTHING)


def test_a_parameter_without_explanation_is_found():
    def scale(x, factor):
        """x, larger."""

    scale.__module__ = "hqqlora"
    ((_, text, parameters),) = documented_functions(scale)
    assert undocumented(text, parameters) == {"factor"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("HQQLinear", "Badri and Shaji"),
        ("LoRALinear", "arxiv.org/abs/2106.09685"),
        ("LoRALinear", "arxiv.org/abs/2312.03732"),
    ],
)
def test_a_method_names_its_source(name, source):
    assert source in inspect.getdoc(getattr(hqqlora, name))


def test_the_ops_are_listed_with_their_shapes():
    text = hqqlora.ops.__doc__
    ops = set(torch._C._dispatch_get_all_op_names())
    names = {op.split("::")[1].split(".")[0] for op in ops if op.startswith("hqqlora::")}
    assert len(names) >= 10
    assert not {name for name in names if f"``{name}``" not in text}


def doctests():
    finder = doctest.DocTestFinder(recurse=False)
    names = {**{name: getattr(hqqlora, name) for name in hqqlora.__all__}, "torch": torch}
    for package, name in public_names():
        value = getattr(importlib.import_module(package), name)
        globs = {**names, name: value}
        found = finder.find(value, f"{package}.{name}", globs=globs)
        yield from (example for example in found if example.examples)


@pytest.mark.parametrize("example", list(doctests()), ids=lambda example: example.name)
def test_the_example_does_what_it_says(example):
    output = []
    results = doctest.DocTestRunner().run(example, out=output.append)
    assert results.failed == 0, "".join(output)


def test_every_c_function_has_a_comment():
    text = HEADER.read_text()
    functions = re.findall(r"^HQQ_API [^;]*?\b(hqq_\w+)\(", text, re.MULTILINE)
    assert len(functions) >= 20
    commented = re.findall(r"\*/\nHQQ_API [^;]*?\b(hqq_\w+)\(", text)
    assert not set(functions) - set(commented)
