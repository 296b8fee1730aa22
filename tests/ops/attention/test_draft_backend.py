"""The attention backend of a draft worker: whose choice it is, and what is said of one that is not supported."""

from __future__ import annotations

import dataclasses
import itertools
import warnings

import pytest

from fusedcomm.ops.attention import DraftBackendFacts, backends, choose_draft_backend, draft_backend

CUDA = frozenset({"flashinfer", "fa3", "torch"})
ROCM = frozenset({"aiter", "triton"})


@pytest.mark.parametrize(
    ("explicit", "target", "on_rocm", "supported", "taken"),
    [
        ("fa3", "torch", False, CUDA, "fa3"),
        (None, "torch", False, CUDA, "torch"),
        (None, None, False, CUDA, "flashinfer"),
        ("trtllm_mha", "torch", False, CUDA, "torch"),
        ("trtllm_mha", None, False, CUDA, "flashinfer"),
        ("trtllm_mha", "cutlass_mla", False, CUDA, "flashinfer"),
        (None, "trtllm_mha", False, CUDA, "flashinfer"),
        ("triton", "aiter", True, ROCM, "triton"),
        (None, "triton", True, ROCM, "triton"),
        (None, None, True, ROCM, "aiter"),
        (None, None, True, frozenset({"triton", "torch"}), "triton"),
        (None, "wave", True, ROCM, "aiter"),
        ("fa3", "wave", True, frozenset({"triton"}), "triton"),
        ("flashinfer", None, True, frozenset({"flashinfer", "triton"}), "flashinfer"),
    ],
)
def test_whose_choice_it_is(
    explicit: str | None, target: str | None, on_rocm: bool, supported: frozenset[str], taken: str
) -> None:
    facts = DraftBackendFacts(supported, on_rocm, explicit=explicit, target=target)
    assert choose_draft_backend(facts).name == taken


def test_every_combination_by_the_rule() -> None:
    """The specification's sentence, word by word, against all facts of four names."""
    names = ("aiter", "triton", "flashinfer", "fa3")
    sets = [frozenset(s) for n in range(1, 5) for s in itertools.combinations(names, n)]
    for supported, on_rocm, explicit, target in itertools.product(sets, (False, True), (None, *names), (None, *names)):
        defaults = [b for b in (("aiter", "triton") if on_rocm else ("flashinfer",)) if b in supported]
        if not defaults:
            continue
        if explicit is not None and explicit in supported:
            want = explicit
        elif target is not None and target in supported:
            want = target
        else:
            want = defaults[0]
        chosen = choose_draft_backend(DraftBackendFacts(supported, on_rocm, explicit=explicit, target=target))
        assert chosen.name == want
        # what was chosen and is not what it takes, as long as nothing before it was taken
        passed_over = [b for b in ((explicit, target) if want != explicit else ()) if b is not None and b != want]
        assert bool(chosen.complaint) == bool(passed_over)
        for backend in passed_over:
            assert f"{backend!r} (" in chosen.complaint
        if passed_over:
            assert chosen.complaint.endswith(f"takes {want!r} instead")


def test_another_default() -> None:
    assert choose_draft_backend(DraftBackendFacts(CUDA, False, "fa3")).name == "fa3"
    assert choose_draft_backend(DraftBackendFacts(ROCM, True, "fa3")).name == "aiter"


@pytest.mark.parametrize(
    ("explicit", "target", "complaint"),
    [
        (
            "trtllm_mha",
            None,
            "'trtllm_mha' (the choice for the draft) cannot attend to a whole block of a draft, which is not causal: "
            "the draft worker takes 'flashinfer' instead",
        ),
        (
            None,
            "cutlass_mla",
            "'cutlass_mla' (the target's) cannot attend to a whole block of a draft, which is not causal: "
            "the draft worker takes 'flashinfer' instead",
        ),
        (
            "trtllm_mha",
            "cutlass_mla",
            "'trtllm_mha' (the choice for the draft) and 'cutlass_mla' (the target's) cannot attend to a whole block "
            "of a draft, which is not causal: the draft worker takes 'flashinfer' instead",
        ),
        ("fa3", "cutlass_mla", ""),
        (None, None, ""),
    ],
)
def test_the_complaint_names_what_is_taken_instead(explicit: str | None, target: str | None, complaint: str) -> None:
    facts = DraftBackendFacts(CUDA, False, explicit=explicit, target=target)
    assert choose_draft_backend(facts).complaint == complaint


def test_it_warns_once_where_it_is_called() -> None:
    backends._warn_once.cache_clear()
    facts = DraftBackendFacts(CUDA, False, explicit="trtllm_mha", target="fa3")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [draft_backend(facts) for _ in range(3)] == ["fa3"] * 3
        assert draft_backend(dataclasses.replace(facts, target=None)) == "flashinfer"
        assert draft_backend(dataclasses.replace(facts, explicit=None)) == "fa3"
    assert [w.category for w in caught] == [RuntimeWarning] * 2
    assert [str(w.message).rpartition("takes ")[2] for w in caught] == ["'fa3' instead", "'flashinfer' instead"]
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize(
    ("supported", "on_rocm", "options", "message"),
    [
        (frozenset({"fa3"}), False, {}, r"supported: expected flashinfer among them, got fa3"),
        (frozenset(), False, {}, r"supported: expected flashinfer among them, got none"),
        (frozenset({"torch", "fa3"}), True, {}, r"supported: expected aiter or triton among them, got fa3, torch"),
        (["flashinfer"], False, {}, r"supported: expected a frozenset of names, got \['flashinfer'\]"),
        (CUDA, False, {"explicit": ""}, r"explicit: expected the name of a backend or None, got ''"),
        (CUDA, False, {"target": 3}, r"target: expected the name of a backend or None, got 3"),
    ],
)
def test_bad_facts(supported: frozenset[str], on_rocm: bool, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftBackendFacts(supported, on_rocm, **options)


def test_facts_do_not_change() -> None:
    facts = DraftBackendFacts(CUDA, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        facts.target = "fa3"  # type: ignore[misc]
