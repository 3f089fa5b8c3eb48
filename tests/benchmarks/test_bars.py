"""Bars are computed from a report: which cases count, against whom, and what is missed."""

import pytest

from qlora_jax.benchmarks import bars

BANDWIDTH = 3.35e12


def case(rows, route, seconds, *, op="forward", shape=(4096, 4096), peer=None, rate=0.0, errors=()):
    return {
        "op": op,
        "in": shape[0],
        "out": shape[1],
        "rows": rows,
        "route": route,
        "seconds": {name: {"median": time} for name, time in seconds.items()},
        "bitsandbytes": peer,
        "bytes_per_second": rate,
        "errors": dict.fromkeys(errors, "why"),
    }


def evaluate(results, dequantize=(), device="NVIDIA H100 80GB HBM3", bandwidth=BANDWIDTH):
    report = {"device": device, "published": {"bandwidth": bandwidth}, "results": results, "dequantize": dequantize}
    return {line["bar"].partition(":")[0] + "|" + line["bar"]: line for line in bars.evaluate(report)}


def line_of(lines, text):
    (found,) = [line for name, line in lines.items() if text in name]
    return found


FUSED, UNFUSED = {"peer": "bnb_fused"}, {"peer": "bnb_dequantize"}
# bar; rows, seconds by way (ours first) and more of a case that meets it, and of one that does not.
CASES = [
    ("never slower than", (8, {"skinny": 1, "bnb_fused": 1}, {}), (8, {"skinny": 1.01, "bnb_fused": 1}, {})),
    ("3 x", (64, {"skinny": 1, "dense": 4, "cublas": 3}, {}), (64, {"skinny": 1, "dense": 4, "cublas": 2.9}, {})),
    ("75 %", (1, {"skinny": 1}, {"rate": 0.76 * BANDWIDTH}), (1, {"skinny": 1}, {"rate": 0.74 * BANDWIDTH})),
    (
        "1.2 x",
        (128, {"tile": 1, "dequantize": 1.3, "bnb_dequantize": 1.2}, UNFUSED),
        (256, {"tile": 1, "dequantize": 1.1, "bnb_dequantize": 1.5}, UNFUSED),
    ),
    (
        "257-1024",
        (1024, {"dequantize": 1, "bnb_dequantize": 1.2}, UNFUSED),
        (512, {"tile": 1, "dequantize": 0.9, "bnb_dequantize": 1.2}, UNFUSED),
    ),
    ("|2048 rows: 0.86", (2048, {"tile": 1, "dense": 0.87}, {}), (2048, {"tile": 1, "dense": 0.85}, {})),
    ("|4096 rows", (4096, {"tile": 1, "cublas": 0.93}, {}), (4096, {"tile": 1, "cublas": 0.91}, {})),
    ("|16384 rows", (16384, {"tile": 1, "cublas": 0.98}, {}), (16384, {"tile": 1, "cublas": 0.96}, {})),
    (
        "1.1 x",
        (2048, {"tile": 1, "bnb_fused": 1.1, "bnb_dequantize": 1}, FUSED),
        (2048, {"tile": 1, "bnb_dequantize": 1}, UNFUSED),
    ),
]


@pytest.mark.parametrize(("bar", "good", "bad"), CASES, ids=[bar for bar, *_ in CASES])
def test_each_bar(bar, good, bad):
    good, bad = (case(rows, next(iter(seconds)), seconds, **more) for rows, seconds, more in (good, bad))
    held = line_of(evaluate([good]), bar)
    assert (held["cases"], held["missed"], held["holds"]) == (1, 0, True)
    missed = line_of(evaluate([good, bad]), bar)
    assert (missed["cases"], missed["missed"], missed["holds"]) == (2, 1, False)
    assert missed["worst"]["case"] == f"forward, 4096 x 4096, {bad['rows']} rows"
    assert missed["worst"]["ratio"] < missed["least"]
    # A result that is wrong is not quick.
    wrong = good | {"errors": {good["route"]: "far away"}}
    assert line_of(evaluate([wrong]), bar)["worst"]["ratio"] == 0


def test_cases_that_a_bar_does_not_mean_do_not_count():
    small = case(1, "skinny", {"skinny": 1, "dense": 1}, shape=(1024, 4096), rate=1.0)
    unmeasured = case(1, "skinny", {}, rate=0.0)
    wrong_peer = case(1, "skinny", {"skinny": 1, "bnb_fused": 0.1}, errors=["bnb_fused"])
    lines = evaluate([small, unmeasured, wrong_peer])
    for text in ("never slower than", "3 x faster"):
        assert line_of(lines, text)["cases"] == 0
        assert line_of(lines, text)["holds"] is None
    assert line_of(lines, "75 %")["cases"] == 1  # the one with seconds, large enough


def test_dequantization():
    shape = {"in": 4096, "out": 4096, "errors": {}}
    assert line_of(evaluate([], [shape | {"of_copy": 0.86}]), "copy bandwidth")["holds"] is True
    lines = evaluate([], [shape | {"of_copy": 0.86}, shape | {"of_copy": 0.84}, {**shape, "errors": {"ours": "no"}}])
    line = line_of(lines, "copy bandwidth")
    assert (line["holds"], line["missed"], line["cases"]) == (False, 1, 2)
    assert line["worst"]["case"] == "4096 x 4096"


def test_other_devices_are_not_judged():
    good = case(8, "skinny", {"skinny": 1, "bnb_fused": 2})
    line = line_of(evaluate([good], device="NVIDIA A100-SXM4-80GB"), "never slower than")
    assert line["holds"] is None
    assert line["worst"]["ratio"] == 2
