"""Reports of ExecuTorch bundles: what is handed over to the backend, and a gate on it."""

from dataclasses import replace

from fastvlm_export.validate import delegation_view, terminal
from fastvlm_export.validate.delegation import Delegation, MethodDelegation, gather

from .pages import shown, strict, words
from .reports import full_report

XNNPACK = "XnnpackBackend"
INSIDE = [("FullyConnected", 9_000), ("Softmax", 900), *[("StaticReshape", 0)] * 3]


def method(name, delegates=1, outside=(), expected=XNNPACK):
    return MethodDelegation(
        method=name,
        delegates=(XNNPACK,) * delegates,
        inside=gather(INSIDE * delegates),
        outside=gather(outside),
        expected=expected,
    )


WHOLE = Delegation(
    backend="xnnpack",
    methods=(
        method("vision_encoder"),
        method("token_embedding", 0, [("aten::embedding.out", 0)], None),
        method("text_decoder", outside=[("aten::index_put_.out", 0)] * 2),
    ),
)
SPLIT = replace(WHOLE, methods=(method("vision_encoder", 3), *WHOLE.methods[1:]))
BESIDE = replace(
    WHOLE, methods=(method("vision_encoder", outside=[("aten::mm.out", 10)]), *WHOLE.methods[1:])
)


def report(placement):
    return full_report(target="executorch", placement=placement)


def test_every_form_shows_what_is_inside_and_outside():
    found = report(WHOLE)
    assert found.passed
    assert "In one delegate each: vision_encoder with 100 % of its FLOPs" in found.verdict
    for text in (words(found), shown(terminal.render(found))):
        assert "5 of 7" in text  # operators of the decoder
        assert "2 aten::index_put_.out" in text
        assert "1 FullyConnected 90.9 %, 1 Softmax 9.09 %; without FLOPs: 3 StaticReshape" in text
        assert "In one delegate each: vision_encoder with" in text
    data = strict(found.to_json())["placement"]
    assert data["passed"] is True
    assert data["methods"][2]["share_of_nodes"] == 5 / 7
    assert data["methods"][2]["outside"] == [
        {"kind": "aten::index_put_.out", "nodes": 2, "flops": 0}
    ]
    assert data["methods"][1]["checks"] == []
    assert [row.delegates for row in delegation_view.rows(WHOLE)] == ["1", "0", "1"]
    foreign = replace(WHOLE.methods[0], delegates=("CoreMLBackend",))
    [row] = delegation_view.rows(replace(WHOLE, methods=(foreign,)))
    assert row.delegates == "1 (CoreMLBackend)"


def test_a_placement_beyond_its_limits_fails_the_report_and_says_why():
    for placement, reason in (
        (SPLIT, "vision_encoder: delegates 3 (limit 1)"),
        (BESIDE, "vision_encoder: FLOPs outside 0.00101 (limit 0.001)"),
    ):
        found = report(placement)
        assert not found.passed
        assert reason in found.verdict
        assert "✗ Failed" in shown(terminal.render(found))
        assert reason in words(found)
        assert strict(found.to_json())["placement"]["passed"] is False
    assert "99.89 %" in words(found)


def test_without_a_backend_the_report_says_that_there_is_no_limit():
    methods = tuple(
        replace(one, delegates=(), inside=(), outside=one.inside, expected=None)
        for one in WHOLE.methods
    )
    found = report(Delegation(backend="portable", methods=methods))
    assert found.passed
    for text in (words(found), shown(terminal.render(found))):
        assert "backend 'portable' has no limit on placement" in text


def test_other_targets_say_nothing_of_placement():
    found = full_report()
    assert strict(found.to_json())["placement"] is None
    assert "Placement" not in words(found) + shown(terminal.render(found))
