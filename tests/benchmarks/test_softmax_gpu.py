"""The GPU benchmark of softmax attention: its problems and masks, and how its table gets into the README."""

import json
import sys
from pathlib import Path

import pytest
import to_readme
import torch
from _softmax_problems import problems
from softmax_gpu import first_and_last_rows, speed
from to_readme import replaced, table

from longctx.kernels.tiles import visible

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("problem", problems(smoke=True), ids=lambda problem: problem.name)
def test_problems_have_the_same_mask_for_us_and_for_flex_attention(problem):
    seen = torch.zeros(problem.tokens, problem.tokens, dtype=torch.bool)
    for tile in problem.tiles:
        seen[tile.rows, tile.columns] |= visible(tile, device="cpu")
    assert seen.sum() == problem.pairs
    i, j = torch.arange(problem.tokens)[:, None], torch.arange(problem.tokens)[None, :]
    assert seen.equal(problem.flex(torch.device("cpu"))(i, i, i, j).expand_as(seen))
    if problem.shift is not None:
        assert seen.equal(j <= i - problem.shift)


def test_full_size_problems_are_what_their_names_say():
    found = {problem.name: problem for problem in problems(smoke=False)}
    assert {name for name in found if name.startswith("causal")} == {f"causal, {n}K" for n in (8, 16, 32, 64, 128)}
    assert found["striped hop, shifted causal, 32K"].shift == 1
    assert found["window of 4K, 128K"].pairs < 4096 * 128 * 1024
    assert len(found["packed documents of 4K, 64K"].bounds) > 8


def test_what_is_wrong_is_seen():
    problem = problems(smoke=True)[0]
    q, k, v, dout = (torch.randn(1, problem.tokens, 2, 8) for _ in range(4))
    rows, want = first_and_last_rows(problem, (q, k, v, dout))
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2)[:, rows], want)


def test_the_table_goes_between_its_markers(tmp_path, monkeypatch):
    row = {"problem": "causal, 8K", "column": "auto", "pairs": 10**9, "head_dim": 128}
    row |= {"forward": [1.0, 2.0, 3.0], "backward": [4.0, 5.0, 6.0]}
    assert speed(row, "both") == pytest.approx(10**9 * 14 * 128 / 7e-3)
    other = {**row, "problem": "ring", "of_ideal": 0.93}
    report = {"environment": {"device": "X", "torch": "2", "triton": "3", "longctx": "abc"}, "matmul_flops": 1e15}
    report |= {"settings": {"heads": 16, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}, "rows": [row, other]}
    results, readme = tmp_path / "softmax_gpu.json", tmp_path / "README.md"
    results.write_text(json.dumps(report))
    readme.write_text("a\n<!-- softmax_gpu -->\nold\n<!-- /softmax_gpu -->\nb\n")
    monkeypatch.setattr(sys, "argv", ["to_readme.py", str(results), "--readme", str(readme)])
    for _ in range(2):
        to_readme.main()
    text = readme.read_text()
    assert text == f"a\n<!-- softmax_gpu -->\n{table(report)}\n<!-- /softmax_gpu -->\nb\n"
    assert "| causal, 8K | 256 (26 %) |" in text and "93 % of ideal" in text
    results.write_text(json.dumps({**report, "environment": {"device": "CPU: a smoke test"}}))
    with pytest.raises(SystemExit, match="no measurement"):
        to_readme.main()
    for bad in ("text", '{"a": 1}', "[]"):
        results.write_text(bad)
        with pytest.raises(SystemExit, match="no report"):
            to_readme.main()
    with pytest.raises(SystemExit, match="once each"):
        replaced("nothing", "softmax_gpu", "x")


def test_the_readme_has_the_markers():
    text = (BENCHMARKS.parent / "README.md").read_text()
    assert replaced(text, "softmax_gpu", "x") != text
