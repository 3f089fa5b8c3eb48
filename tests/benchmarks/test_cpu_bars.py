"""What a CPU is held to: by rows, against the faster mode, on the machines that a bar is about."""

import pytest

from qlora_jax.benchmarks import cpu_bars


def case(rows, gains, *, op="forward", faster=None, of_float32=None, errors=()):
    measured = {
        "op": op,
        "in": 4096,
        "out": 11008,
        "rows": rows,
        "route": "ours",
        "ratio": {way: {"median": 1 / gain} for way, gain in gains.items()},
        "bitsandbytes": faster,
        "errors": dict.fromkeys(errors, "far away"),
    }
    return measured | ({} if of_float32 is None else {"of_float32": {"median": of_float32}})


def evaluate(results, isa="amx_bf16", quantize=(), kernel="bitsandbytes"):
    report = {
        "instruction_set": isa,
        "results": results,
        "quantize": [
            {"in": 1, "out": 2, "route": "ours", "errors": {}, "bytes_per_second_and_core": own} for own in quantize
        ],
        "peers": {"peers": {}},
        "eval_kernel": kernel,
    }
    return cpu_bars.evaluate(report)


def line(lines, text):
    (found,) = [line for line in lines if line["bar"].startswith(text)]
    return found


@pytest.mark.parametrize(
    ("rows", "of_bitsandbytes", "of_dense"),
    [(1, 1.0, 1.7), (8, 1.5, 0.9), (32, 4.0, 0.9), (128, 4.0, 0.95), (512, 2.0, 0.95), (2048, 1.5, 0.95)],
)
def test_products_by_rows(rows, of_bitsandbytes, of_dense):
    start = f"{rows} row{'s' if rows > 1 else ''}, forward: "
    for above in (1.01, 0.99):
        gains = {"torch": of_dense * above, "bnb_train": 100.0, "bnb_eval": of_bitsandbytes * above}
        lines = evaluate([case(rows, gains, faster="bnb_eval"), case(rows, gains, op="dx", faster="bnb_train")])
        for text in (
            f"{start}{of_bitsandbytes} x the speed of the faster mode",
            f"{start}{of_dense} x the speed of torch",
        ):
            assert line(lines, text)["cases"] == 1
            assert line(lines, text)["holds"] is (above > 1)


def test_the_faster_mode_is_the_one_that_counts():
    slow = case(512, {"bnb_train": 1.9, "bnb_eval": 9.0}, faster="bnb_train")
    assert line(evaluate([slow]), "512 rows, forward: 2.0 x")["worst"]["ratio"] == pytest.approx(1.9)


def test_dx_is_held_to_the_dense_product():
    lines = evaluate([case(8, {"torch": 0.81}, op="dx"), case(1, {"torch": 0.79}, op="dx")])
    assert (line(lines, "dx")["missed"], line(lines, "dx")["holds"]) == (1, False)


def test_what_is_about_amx_is_not_judged_without_it():
    measured = [case(512, {"torch": 2.0, "bnb_train": 3.0}, faster="bnb_train", of_float32=0.8)]
    with_amx, without = evaluate(measured), evaluate(measured, isa="avx512")
    for text in ("512 rows, forward: 2.0 x", "512 rows, forward: 0.95 x"):
        assert line(with_amx, text)["holds"] is True
        assert line(without, text)["holds"] is None
        assert line(without, text)["worst"]["ratio"] > 1
    assert line(with_amx, "128 rows and more")["holds"] is None
    assert line(without, "128 rows and more")["holds"] is True
    assert line(evaluate([case(512, {}, of_float32=0.7)], isa="avx2"), "128 rows and more")["holds"] is False


def test_quantization_is_counted_for_each_core():
    assert line(evaluate([], quantize=[{"ours": 1.1e9}]), "quantize")["holds"] is True
    assert line(evaluate([], quantize=[{"ours": 1.1e9}, {"ours": 0.9e9}]), "quantize")["holds"] is False


def test_nothing_is_judged_that_was_not_measured_and_what_is_wrong_is_not_quick():
    assert {line["holds"] for line in evaluate([])} == {None}
    wrong = case(8, {"torch": 5.0}, errors=["ours"])
    assert line(evaluate([wrong]), "8 rows, forward: 0.9 x")["worst"]["ratio"] == 0


def test_bitsandbytes_without_its_kernel_is_marked():
    assert not [line for line in evaluate([]) if "no eval() kernel here" in line["bar"]]
    assert len([line for line in evaluate([], kernel=None) if "no eval() kernel here" in line["bar"]]) == 6


def test_steps():
    def runs(**gains):
        return [{"name": name, "ratio": {"median": 1 / gain}} for name, gain in {"ours": 1.0, **gains}.items()]

    lines = cpu_bars.evaluate_step(runs(peft=1.7, qwix=2.5))
    assert [line["holds"] for line in lines] == [True, False]
    assert [line["holds"] for line in cpu_bars.evaluate_step(runs())] == [None, None]
    (demo,) = cpu_bars.evaluate_demo(runs(peft=1.9, peft_answers=1.4))
    assert (demo["holds"], demo["worst"]["case"]) == (False, "peft_answers")
    assert cpu_bars.evaluate_demo(runs(peft=1.9, peft_answers=1.6))[0]["holds"] is True
