"""The exercises: every mistake gets its name, every right answer passes, oracle = reference."""

import dataclasses
import inspect
import re
import subprocess
import sys
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import pytest
from answers import (  # noqa: F401
    MUTATING,
    RIGHT,
    WRONG,
    ch01_softmax,
    ch02_gradient_checking,
    ch03_attention,
    ch04_multihead,
    ch05_positions,
    ch06_residual_layernorm,
    ch07_encoder,
    ch08_training,
    ch09_recurrent,
    ch10_streaming,
    ch11_control,
    ch12_memory,
    ch13_flash,
    ch14_mixed_precision,
)

from attn_lessons import hunt
from attn_lessons.grading import catalogue, check, compare, diagnose, feedback
from attn_lessons.grading.exercise import Exercise
from attn_lessons.grading.probe import KINDS, SHAPED_LIKE, Probe
from attn_lessons.grading.protocol import decode, encode

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = catalogue.exercises()
SEEDS = (11, 12)
EXPECTED = {}  # by exercise and case, which is kept, so that nothing else gets its id

# Numbers of an answer and of its reference agree to this, relative to the largest entry.
AGREEMENT = 1e-10
# The library's default step extrapolates; the oracle takes no difference at all.
MEASURED = 1e-8


def draws_of(exercise: Exercise, seed: int):
    sequences = [np.random.SeedSequence([seed, n]) for n in range(2)]
    return check.make_draws(exercise, sequences)


@cache
def drawn(exercise_id: str, seed: int):
    """One draw for all answers to an exercise: they get copies."""
    return draws_of(catalogue.find(exercise_id), seed)


@pytest.fixture(autouse=True)
def expected_once(monkeypatch, unchecked):
    """An oracle is slow and its cases are the same for all answers: ask it once a case.

    And answers that call the library meet it as a learner does, without the tests' shape checks.
    """
    compute = check.expected

    def expected(exercise, case):
        key = (exercise.id, id(case))
        if key not in EXPECTED:
            EXPECTED[key] = case, compute(exercise, case)
        return EXPECTED[key][1]

    monkeypatch.setattr(check, "expected", expected)


def verdict(exercise: Exercise, answer, seed: int):
    draws = drawn(exercise.id, seed)
    results = [[diagnose.attempt(answer, exercise, case) for case in cases] for cases in draws]
    return check.judge(exercise, draws, results)


def by_id(exercise):
    return exercise.id


def each(table):
    return [
        pytest.param(catalogue.find(exercise), answer, id=f"{exercise}-{answer.__name__}")
        for exercise, answers in table.items()
        for answer in answers
    ]


def each_mistake(first_only=False):
    params = []
    for exercise in EXERCISES:
        seen = {}
        for mistake in exercise.mistakes:
            way = seen[mistake.name] = seen.get(mistake.name, 0) + 1
            if way == 1 or not first_only:
                label = f"{exercise.id}-{mistake.name}-{way}"
                params.append(pytest.param(exercise, mistake, id=label))
    return params


# --------------------------------------------------------------------------- what there is


def test_the_exercises_are_those_of_the_book():
    found = {chapter: [] for chapter in catalogue.chapters()}
    for exercise in EXERCISES:
        found[exercise.chapter].append(exercise.id)
    assert found["ch01_softmax"] == [
        "softmax",
        "log_softmax",
        "softmax_jacobian",
        "softmax_backward",
        "cross_entropy",
    ]
    assert found["ch02_gradient_checking"] == [
        "numerical_gradient",
        "relative_error",
        "directional_check",
        "first_wrong",
    ]
    assert found["ch03_attention"] == [
        "causal_mask",
        "padding_mask",
        "attention_forward",
        "attention_backward",
        "attention_backward_dropout",
    ]
    assert found["ch04_multihead"] == [
        "split_heads",
        "merge_heads",
        "linear_backward",
        "multihead_backward",
        "cross_attention_backward",
        "grouped_kv_backward",
    ]
    assert found["ch05_positions"] == [
        "sinusoidal_positions",
        "learned_positions_backward",
        "rope",
        "rope_backward",
        "rope_permutation",
        "alibi_slopes",
        "alibi_bias",
    ]
    assert found["ch06_residual_layernorm"] == [
        "layernorm_forward",
        "layernorm_backward",
        "rmsnorm_backward",
        "residual_backward",
        "gelu_backward",
        "ffn_backward",
    ]
    assert found["ch07_encoder"] == [
        "encoder_block_backward",
        "embedding_backward",
        "padded_embedding_backward",
        "tied_output_backward",
        *(f"hunt_{number}" for number in range(1, 7)),
    ]
    assert found["ch08_training"] == [
        "sgd_step",
        "adamw_step",
        "model_adamw_step",
        "clip_by_global_norm",
        "warmup_inverse_sqrt",
        "warmup_cosine",
        "accumulate_gradients",
        "padded_cross_entropy",
    ]
    assert found["ch09_recurrent"] == [
        "rnn_backward",
        "lstm_step_forward",
        "lstm_step_backward",
        "lstm_backward",
        "gradient_norm_by_lag",
    ]
    assert found["ch10_streaming"] == [
        "kv_cache_bytes",
        "ring_positions",
        "position_mask",
        "kv_cache_step",
        "rope_cache_step",
        "chunked_causal_attention",
    ]
    assert found["ch11_control"] == [
        "condense",
        "riccati_step",
        "mpc_qp",
        "qp_residuals",
        "closed_loop_metrics",
    ]
    assert found["ch12_memory"] == [
        "attention_flops",
        "attention_bytes",
        "checkpointed_backward",
    ]
    assert found["ch13_flash"] == ["merge_softmax_blocks", "flash_forward", "flash_backward"]
    assert found["ch14_mixed_precision"] == [
        "round_to_bf16",
        "mixed_precision_dot",
        "loss_scale_step",
        "unscale_then_clip",
    ]


def test_an_unknown_exercise_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="softmax_backward"):
        catalogue.find("softmax_backwards")
    with pytest.raises(ValueError, match="there are softmax, log_softmax"):
        catalogue.find("zzzz")


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_an_entry_is_complete(exercise):
    assert exercise.id == exercise.reference.__name__
    assert exercise.points > 0
    assert len({m.name for m in exercise.mistakes}) >= 4
    names = [case.name for case in draws_of(exercise, 1)[0]]
    assert len(set(names)) == len(names) >= 8
    assert all(case.hint for case in draws_of(exercise, 1)[0])
    assert not [name for name in names if "," in name], "names are listed with commas"
    for mistake in exercise.mistakes:
        assert re.fullmatch(r"ch\d\d_\w+\.html#ch\d\d-[a-z-]+", mistake.section)
        # A mistake carried over from an earlier exercise is explained where that one is.
        chapter = mistake.section.split(".html")[0]
        carried = " (in " in mistake.name and chapter in catalogue.chapters()
        assert chapter == exercise.chapter or (carried and chapter < exercise.chapter)
        assert mistake.why.endswith(".")


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_a_mistake_links_to_a_heading_of_its_page(exercise):
    for mistake in exercise.mistakes:
        name, anchor = mistake.section.split(".html#")
        assert f"({anchor})=" in (ROOT / "book" / f"{name}.md").read_text(encoding="utf-8")


def test_mistakes_named_in_the_list_of_exercises_are_there():
    listed = {
        "softmax": [
            "no max subtraction",
            "max over the whole array",
            "normalised over the wrong axis",
            "keepdims forgotten",
        ],
        "log_softmax": ["log of softmax", "logsumexp without max"],
        "softmax_jacobian": ["diagonal only", "p pᵀ sign", "outer product only"],
        "softmax_backward": [
            "row sum dropped",
            "diagonal p(1-p)",
            "sum over all axes",
            "multiplied by upstream twice",
        ],
        "cross_entropy": [
            "gradient not divided by B",
            "softmax applied twice",
            "smoothing spread over K-1 classes",
            "smoothing forgotten in the gradient",
        ],
        "numerical_gradient": [
            "forward difference",
            "x not restored",
            "shared view",
            "eps too small",
        ],
        "relative_error": ["division by zero", "nan ignored", "mean instead of max"],
        "causal_mask": ["strictly lower", "upper", "top-left when n_q≠n_k"],
        "attention_forward": [
            "no 1/√d",
            "1/√(H·d)",
            "scaled after softmax",
            "mask after softmax",
            "multiplied instead of masked",
            "NaN on a fully masked row",
        ],
        "attention_backward": [
            "scale forgotten in dq or dk",
            "probs not transposed for dv",
            "row sum dropped",
            "dk transposed",
            "dq and dk swapped",
        ],
        "attention_backward_dropout": [
            "mask not applied in backward",
            "1/(1-rate) forgotten",
            "dv from undropped probabilities",
        ],
        "split_heads": ["reshape without transpose", "transposed wrong pair"],
        "merge_heads": ["reshape without transpose", "transposed wrong pair"],
        "linear_backward": ["db summed over batch only", "dw averaged", "w not transposed"],
        "multihead_backward": [
            "dx from one of q, k, v only",
            "last instead of summed",
            "scale by √C",
            "merge order in dwo",
            "bo forgotten",
        ],
        "cross_attention_backward": ["memory gradient from k only"],
        "grouped_kv_backward": ["mean", "wrong interleaving: repeat taken as tile"],
        "sinusoidal_positions": [
            "exponent 2i/d with i already doubled",
            "cos shifted",
            "interleaved vs halves",
        ],
        "rope": ["halves instead of pairs", "base exponent"],
        "rope_backward": ["same rotation in backward", "halves instead of pairs", "base exponent"],
        "layernorm_forward": ["Bessel's correction", "eps outside the root", "wrong axis"],
        "layernorm_backward": [
            "mean term missing",
            "variance term missing",
            "gamma forgotten",
            "dgamma summed over batch only",
        ],
        "rmsnorm_backward": ["treated as LayerNorm"],
        "residual_backward": ["skip path dropped", "doubled"],
        "gelu_backward": ["tanh form", "activation gradient at the output"],
        "ffn_backward": ["tanh form", "activation gradient at the output"],
        "encoder_block_backward": [
            "first residual forgotten",
            "second residual forgotten",
            "norm gradient skipped",
            "pre and post mixed",
        ],
        "embedding_backward": ["assignment instead of accumulation"],
        "padded_embedding_backward": ["padding row not zeroed"],
        "tied_output_backward": ["output's contribution only", "embedding's contribution only"],
        "adamw_step": [
            "L2 in the moments",
            "no bias correction",
            "decay on the updated weight",
            "eps inside the root",
            "step off by one",
        ],
        "clip_by_global_norm": [
            "per tensor",
            "scaled up when below",
            "scaled where the norm is not finite",
        ],
        "warmup_inverse_sqrt": ["off by one", "discontinuous at the join"],
        "warmup_cosine": ["off by one", "discontinuous at the join"],
        "rnn_backward": [
            "carry from t+1 dropped",
            "tanh′ of the input",
            "1+h²",
            "grads overwritten, not summed over time",
        ],
        "lstm_step_backward": [
            "dc path through h missing",
            "forget gate not carried",
            "i gate multiplied by i",
            "gate order",
        ],
        "lstm_backward": [
            "dc path through h missing",
            "forget gate not carried",
            "i gate multiplied by i",
            "gate order",
        ],
        "kv_cache_step": ["mask sliced to one key", "cache overwritten"],
        "chunked_causal_attention": ["chunk sees the future"],
        "condense": ["first input not applied"],
        "mpc_qp": [
            "factor 2",
            "bounds in the wrong rows",
            "terminal cost forgotten",
            "first input not applied",
        ],
        "closed_loop_metrics": ["first input not applied"],
        "attention_flops": ["multiply-add counted once", "backward counted as forward"],
        "checkpointed_backward": ["dropout not replayed"],
        "merge_softmax_blocks": ["inverse rescale", "max not carried"],
        "flash_forward": [
            "inverse rescale",
            "max not carried",
            "lse after normalisation",
            "ragged last block",
        ],
        "flash_backward": ["delta from one block", "ragged last block", "scale missing in dq"],
        "round_to_bf16": ["truncation"],
        "mixed_precision_dot": ["fp16 accumulator"],
        "loss_scale_step": ["step taken on inf", "scale never regrows"],
        "unscale_then_clip": ["clip before unscale", "step taken on inf"],
    }
    for exercise, names in listed.items():
        assert set(names) <= {m.name for m in catalogue.find(exercise).mistakes}


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_every_draw_has_the_same_cases_on_fresh_numbers(exercise):
    one, other = draws_of(exercise, 5)
    assert [case.name for case in one] == [case.name for case in other]
    fresh = [a.args != b.args for a, b in zip(numbers(one), numbers(other), strict=True)]
    fixed = {"uniform p", "nothing but zeros", "one class"}
    # A few small counts can only come again.
    fixed |= {case.name for case in one if not with_arrays(case)}
    assert {a.name for a, new in zip(one, fresh, strict=True) if not new} <= fixed
    again = numbers(draws_of(exercise, 5)[0])
    assert [vars(case) for case in numbers(one)] == [vars(case) for case in again]


def with_arrays(case):
    return any(isinstance(a, np.ndarray | Probe) for a in (*case.args, *case.kwargs.values()))


def numbers(cases):
    """The cases with everything in their arguments encoded, so that they compare."""
    return [dataclasses.replace(case, args=encode(case.args)) for case in cases]


def test_checks_read_no_torch_and_no_scipy():
    code = (
        "import sys; from attn_lessons import check; from attn_lessons.softmax import softmax; "
        "check('softmax', softmax); "
        "print(sorted({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------ oracle = reference


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_oracle_agrees_with_the_library(exercise, seed):
    measured = exercise.id in ("numerical_gradient", "directional_check")
    for case in [case for cases in draws_of(exercise, seed) for case in cases]:
        got = diagnose.attempt(exercise.reference, exercise, case)
        want = diagnose.attempt(exercise.oracle, exercise, case)
        assert (got.error, want.error) == (None, None), case.name
        for leaf in compare.leaves(got.value, want.value, exercise.returns):
            if isinstance(leaf.want, str) or leaf.want is None:
                assert leaf.got == leaf.want, case.name
                continue
            single = any(a.dtype == np.float32 for a in compare._floats(case))
            limit = 1e-6 if single else MEASURED if measured else AGREEMENT
            off = compare.difference(leaf.got, leaf.want).max(initial=0)
            assert off <= limit * max(compare.largest(leaf.want), 1e-3), case.name


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_the_oracle_is_not_the_library(exercise):
    assert exercise.oracle is not None
    module = sys.modules[exercise.oracle.__module__]
    assert module.__name__.startswith("attn_lessons.grading.catalogue")
    assert f"library.{exercise.id}" not in inspect.getsource(inspect.unwrap(exercise.oracle))


# ------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_there_are_six_right_answers(exercise):
    assert len(RIGHT[exercise.id]) >= 6
    # Counts cannot be changed.
    assert MUTATING[exercise.id] or not any(map(with_arrays, draws_of(exercise, 1)[0]))


@pytest.mark.parametrize(("exercise", "answer"), each(RIGHT))
def test_a_right_answer_passes(exercise, answer):
    for seed in SEEDS:
        judged = verdict(exercise, answer, seed)
        assert judged.status == "passed", judged.message
        assert judged.diagnosis is None


@pytest.mark.parametrize(("exercise", "answer"), each(MUTATING))
def test_an_answer_that_changes_its_input_is_told_so(exercise, answer):
    for seed in SEEDS:
        judged = verdict(exercise, answer, seed)
        assert judged.status == "failed"
        assert judged.mismatch.kind == "mutated", judged.message
        assert judged.diagnosis.mistake in ("changes its input", "x not restored")


# ------------------------------------------------------------------------------- wrong answers


@pytest.mark.parametrize(("exercise", "mistake"), each_mistake())
def test_a_mistake_gets_its_name(exercise, mistake):
    first_way = next(m for m in exercise.mistakes if m.name == mistake.name)
    for seed in SEEDS if mistake is first_way else SEEDS[:1]:
        judged = verdict(exercise, mistake.answer, seed)
        assert judged.status in ("failed", "error")
        assert judged.diagnosis.mistake == mistake.name
        assert judged.diagnosis.why == mistake.why


@pytest.mark.parametrize(("exercise", "mistake"), each_mistake(first_only=True))
def test_a_mistake_gets_no_other_name(exercise, mistake):
    others = tuple(m for m in exercise.mistakes if m.name != mistake.name)
    judged = verdict(dataclasses.replace(exercise, mistakes=others), mistake.answer, 21)
    if judged.mismatch.kind == "mutated":
        assert judged.diagnosis.mistake == "changes its input"
    else:
        assert judged.diagnosis.mistake is None


def in_float32(answer):
    def called(*args, **kwargs):
        return leafwise(lambda v: np.asarray(v, dtype=np.float32))(answer(*args, **kwargs))

    return called


IN_SINGLE = (
    "softmax",
    "softmax_jacobian",
    "softmax_backward",
    "cross_entropy",
    "split_heads",
    "merge_heads",
    "linear_backward",
    "multihead_backward",
    "grouped_kv_backward",
    "attention_forward",
    "attention_backward",
    "attention_backward_dropout",
    "sinusoidal_positions",
    "learned_positions_backward",
    "rope",
    "rope_backward",
    "alibi_slopes",
    "alibi_bias",
    "rmsnorm_backward",
    "residual_backward",
    "gelu_backward",
    "ffn_backward",
    "encoder_block_backward",
    "embedding_backward",
    "padded_embedding_backward",
    "tied_output_backward",
    *(f"hunt_{number}" for number in range(1, 6)),
    "rnn_backward",
    "lstm_step_forward",
    "lstm_step_backward",
    "lstm_backward",
    "gradient_norm_by_lag",
    "kv_cache_step",
    "rope_cache_step",
    "chunked_causal_attention",
    "condense",
    "riccati_step",
    "mpc_qp",
    "closed_loop_metrics",
    "checkpointed_backward",
    "round_to_bf16",
    "merge_softmax_blocks",
    "flash_forward",
    "flash_backward",
)
# On large logits this one returns gradients near 1e-156, which float32 rounds to 0.
TOO_FINE = "softmax derivative applied twice"
# Weights of logits that are wrong by hundreds: up to 1e300, which float32 rounds to infinity.
TOO_LARGE = ("flash_backward", "keys reshaped instead of transposed")


@pytest.mark.parametrize(
    ("exercise", "mistake"),
    [
        param
        for param in each_mistake(first_only=True)
        if param.values[0].id in IN_SINGLE
        and param.values[1].name != TOO_FINE
        and (param.values[0].id, param.values[1].name) != TOO_LARGE
    ],
)
def test_a_mistake_in_float32_gets_its_name(exercise, mistake):
    judged = verdict(exercise, in_float32(mistake.answer), 31)
    assert judged.diagnosis.mistake == mistake.name


@pytest.mark.parametrize(("exercise", "answer"), each(WRONG))
def test_an_unlisted_wrong_answer_is_described(exercise, answer):
    judged = verdict(exercise, answer, 41)
    assert judged.status in ("failed", "error")
    assert judged.diagnosis is not None
    # The first case that fails, and what is wrong there, in words and numbers.
    assert judged.mismatch.case
    assert judged.mismatch.message


def scaled_gradient_of_wk(factor):
    reference = catalogue.find("multihead_backward").reference

    def answer(*args):
        dx, grads = reference(*args)
        return dx, grads | {"wk": factor * grads["wk"]}

    return answer


def blurred_probabilities(*args):
    """Multi-head attention of logits that are too small by an odd factor."""
    dout, x, wq, wk, wv, wo, bq, *rest = args
    return catalogue.find("multihead_backward").reference(
        dout, x, 0.7 * wq, wk, wv, wo, 0.7 * bq, *rest
    )


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (
            scaled_gradient_of_wk(0.37),
            "probs, merged and dv are right; dlogits is right, as grads['wq'] shows: grads['wk'] "
            "goes wrong after it",
        ),
        (
            blurred_probabilities,
            "first wrong on the way: solved from grads['wo'], probs is off, or the step from it "
            "to grads['wo'] is",
        ),
    ],
)
def test_multihead_backward_names_its_first_wrong_intermediate(answer, fact):
    judged = verdict(catalogue.find("multihead_backward"), answer, 41)
    assert judged.diagnosis.mistake is None
    assert judged.diagnosis.observations[0] == fact


def attention_of_wide_heads(q, k, v, mask=None):
    """The model's width in the scale, and a finite sentinel: two mistakes at once."""
    wide = q * q.shape[1] ** -0.5
    blind = 0 if mask is None else ~np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    probs = catalogue.find("attention_forward").reference(wide, k, v, mask)[1]
    probs = np.where(np.all(blind, axis=-1, keepdims=True), 1 / k.shape[2], probs)
    return probs @ v, probs


def half_the_row_sum(dout, q, k, v, probs):
    dprobs = dout @ v.swapaxes(-1, -2)
    dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True) / 2)
    dlogits = dlogits * q.shape[-1] ** -0.5
    return dlogits @ k, dlogits.swapaxes(-1, -2) @ q, probs.swapaxes(-1, -2) @ dout


def third_of_dk_through_dropout(*args):
    dq, dk, dv = catalogue.find("attention_backward_dropout").reference(*args)
    return dq, dk / 3, dv


@pytest.mark.parametrize(
    ("exercise", "answer", "facts"),
    [
        (
            "attention_forward",
            attention_of_wide_heads,
            [
                "first wrong on the way: solved from probs, logits (less each row's mean) is off, "
                "or the step from it to probs is",
                "logits (less each row's mean) is 1/sqrt(q.shape[-3]) times what it should be "
                "(0.5774 in the case “several heads”)",
            ],
        ),
        (
            "attention_backward",
            half_the_row_sum,
            ["first wrong on the way: dq and dk were made of the same wrong dlogits"],
        ),
        (
            "attention_backward_dropout",
            third_of_dk_through_dropout,
            [
                "the weight matrix in dv is right; dlogits is right, as dq shows: dk "
                "goes wrong after it"
            ],
        ),
        (
            "flash_backward",
            ch13_flash.backward_half_delta,
            ["first wrong on the way: p is right; dq and dk were made of the same wrong dz"],
        ),
        (
            "flash_backward",
            ch13_flash.backward_third_of_dk,
            ["p is right; dz is right, as dq shows: dk goes wrong after it"],
        ),
        (
            "flash_backward",
            ch13_flash.backward_blurred,
            [
                "first wrong on the way: solved from dv, p is off, or the step from it to dv is",
                "p is 0.7408 times what it should be",
            ],
        ),
    ],
)
def test_attention_names_its_first_wrong_intermediate(exercise, answer, facts):
    judged = verdict(catalogue.find(exercise), answer, 41)
    assert judged.diagnosis.mistake is None
    assert list(judged.diagnosis.observations[: len(facts)]) == facts


def blurred_hidden_gradient(dout, x, w1, b1, w2, b2):
    """The feed-forward layer with a slope that is off by an odd constant."""
    reference = catalogue.find("ffn_backward").reference
    dx, grads = reference(dout, x, w1, b1, w2, b2)
    hidden = x @ w1 + b1
    more = 0.3 * (dout @ w2.T) * np.cos(hidden)
    rows = more.reshape(-1, more.shape[-1])
    dw1 = grads["w1"] + x.reshape(-1, x.shape[-1]).T @ rows
    return dx + more @ w1.T, grads | {"w1": dw1, "b1": grads["b1"] + rows.sum(axis=0)}


def test_ffn_backward_names_its_first_wrong_intermediate():
    judged = verdict(catalogue.find("ffn_backward"), blurred_hidden_gradient, 41)
    assert judged.diagnosis.mistake is None
    assert judged.diagnosis.observations[0] == (
        "first wrong on the way: active is right; grads['w1'] and dx were made of the same wrong "
        "dhidden"
    )


def blurred_normalisation(dy, x, gamma, eps=1e-5):
    return catalogue.find("layernorm_backward").reference(dy, x, gamma, 3 * eps + 0.2)


def test_layernorm_backward_names_its_first_wrong_intermediate():
    judged = verdict(catalogue.find("layernorm_backward"), blurred_normalisation, 41)
    assert judged.diagnosis.mistake is None
    assert judged.diagnosis.observations[0] == (
        "first wrong on the way: solved from dgamma, xhat is off, or the step from it to dgamma is"
    )


@pytest.mark.parametrize(
    ("exercise", "answer", "fact"),
    [
        (
            "rnn_backward",
            ch09_recurrent.rnn_leaky_carry,
            "first wrong on the way: dz of the last step is right; solved from dx, dz of the step "
            "before it is off, or the step from it to dx is",
        ),
        (
            "lstm_step_backward",
            ch09_recurrent.back_odd_forget_slope,
            "first wrong on the way: dc in all and dz of i are right; grads['wx'] and grads['wh'] "
            "were made of the same wrong dz of f",
        ),
        (
            "lstm_backward",
            ch09_recurrent.lstm_leaky_carry,
            "first wrong on the way: dz of the last step is right; solved from dx, dz of the step "
            "before it is off, or the step from it to dx is",
        ),
    ],
)
def test_going_back_through_time_names_its_first_wrong_intermediate(exercise, answer, fact):
    judged = verdict(catalogue.find(exercise), answer, 41)
    assert judged.diagnosis.mistake is None
    assert judged.diagnosis.observations[0] == fact


def test_checkpointed_backward_names_its_first_wrong_intermediate():
    exercise = catalogue.find("checkpointed_backward")
    judged = verdict(exercise, ch12_memory.checkpoint_blurred_slope, 41)
    assert judged.diagnosis.mistake is None
    assert judged.diagnosis.observations[0] == (
        "first wrong on the way: solved from grads[4]['w'], da of layer 4 is off, or the step from "
        "it to grads[4]['w'] is"
    )


def test_dropout_that_nobody_can_replay_is_told_from_a_wrong_gradient():
    judged = verdict(
        catalogue.find("checkpointed_backward"), ch12_memory.checkpoint_with_fresh_noise, 41
    )
    assert judged.diagnosis.mistake is None
    assert any(
        fact.startswith("only “dropout in one layer”, “dropout in every layer”")
        for fact in judged.diagnosis.observations
    )


def block_with(skip):
    """An encoder block's gradients, the second skip path's taken ``skip`` times."""

    def answer(dout, x, params, n_heads, mask=None, norm="post"):
        reference = catalogue.find("encoder_block_backward").reference
        whole, grads = reference(dout, x, params, n_heads, mask, norm)
        lost, without = second_residual_forgotten(dout, x, params, n_heads, mask, norm)
        mixed = {n: skip * grads[n] + (1 - skip) * without[n] for n in grads}
        return skip * whole + (1 - skip) * lost, mixed

    return answer


def second_residual_forgotten(*args):
    mistakes = catalogue.find("encoder_block_backward").mistakes
    return next(m for m in mistakes if m.name == "second residual forgotten").answer(*args)


def test_encoder_block_backward_names_its_first_wrong_intermediate():
    judged = verdict(catalogue.find("encoder_block_backward"), block_with(0.37), 41)
    assert judged.diagnosis.mistake is None
    first, parts, gradient = judged.diagnosis.observations[:3]
    assert first == (
        "first wrong on the way: dffn and dhidden are right; solved from grads['self_attn.wo'], "
        "dattn is off, or the step from it to grads['self_attn.wo'] is"
    )
    assert parts == (
        "linear1, linear2 and norm2 are right in every case, only dx, self_attn and norm1 not"
    )
    assert re.fullmatch(
        r"the first wrong one on the way back is grads\['norm1.weight'\], off by up to [\d.]+ % "
        "of its largest entry",
        gradient,
    )


FIRST_WRONG = {
    1: "grads['norm1.gamma']",
    2: "grads['ffn.w2']",
    3: "grads['self_attn.wv']",
    4: "grads['norm1.gamma']",
    5: "grads['cross_attn.wo']",
}


@pytest.mark.parametrize("number", FIRST_WRONG)
def test_a_block_as_handed_out_is_told_so_and_what_is_right_in_it(number):
    exercise = catalogue.find(f"hunt_{number}")
    judged = verdict(exercise, hunt.BLOCKS[number][1], 41)
    assert judged.diagnosis.mistake == "the bug is still there"
    right, first = judged.diagnosis.observations[:2]
    assert "right in every case, only" in right
    assert first.startswith(f"the first wrong one on the way back is {FIRST_WRONG[number]}, off by")
    told = feedback.text(judged)
    assert len(told.splitlines()) <= 15
    assert first.split(",")[0] in told.replace("\n    ", " ")
    assert escape(first) in feedback.html(judged, exercise)
    # Its cases differ in size: none of them says what the mistake is about.
    assert judged.cases_passed == ()


def test_block_6_as_handed_out_is_told_which_argument_it_changes():
    judged = verdict(catalogue.find("hunt_6"), hunt.BLOCKS[6][1], 41)
    assert judged.diagnosis.mistake == "the bug is still there"
    assert judged.mismatch.kind == "mutated"
    assert judged.mismatch.output == "dout"
    assert judged.cases_passed == ()


def leafwise(change):
    def changed(value):
        if isinstance(value, tuple | list):
            return tuple(changed(part) for part in value)
        if isinstance(value, dict):
            return {name: changed(part) for name, part in value.items()}
        return change(value)

    return changed


def numeric(change):
    return leafwise(lambda v: v if v is None or isinstance(v, str) else change(np.asarray(v)))


SPOILED = {
    "zeros": leafwise(lambda v: np.zeros(np.shape(v)) if not isinstance(v, str) else 0.0),
    "NaN": leafwise(lambda v: np.full(np.shape(v), np.nan) if not isinstance(v, str) else np.nan),
    "None": lambda value: None,
    "an axis more": numeric(lambda v: v[None]),
    "flat": numeric(lambda v: v.ravel()),
    "1e-6 off": numeric(lambda v: v * (1 + 1e-6)),
    "negated": numeric(lambda v: ~v if v.dtype == bool else -v),
}


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
@pytest.mark.parametrize("way", SPOILED)
def test_a_spoiled_right_answer_fails(exercise, way):
    if exercise.id == "first_wrong" and way in ("an axis more", "flat", "1e-6 off", "negated"):
        pytest.skip("names have no numbers in them")
    vectors = ("rope_permutation", "alibi_slopes", "ring_positions", "gradient_norm_by_lag")
    if exercise.id in vectors and way == "flat":
        pytest.skip("a vector is flat")

    def answer(*args, **kwargs):
        return SPOILED[way](exercise.reference(*args, **kwargs))

    assert verdict(exercise, answer, 51).status == "failed"


@pytest.mark.parametrize("exercise", EXERCISES, ids=by_id)
def test_one_entry_off_by_a_millionth_fails(exercise):
    if exercise.id == "first_wrong":
        pytest.skip("names have no numbers in them")

    def answer(*args, **kwargs):
        value = exercise.reference(*args, **kwargs)
        if exercise.id in ("kv_cache_step", "rope_cache_step"):
            out_t, (k, *rest) = value
            return out_t, (nudged(k), *rest)
        last = value[-1] if isinstance(value, tuple) else value
        if isinstance(last, list):  # one dict a layer
            return (*value[:-1], [{n: nudged(g) for n, g in d.items()} for d in last])
        if isinstance(last, dict):
            name, entry = next(iter(last.items()))
            changed = last | {name: nudged(entry)}
            return (*value[:-1], changed) if isinstance(value, tuple) else changed
        return (*value[:-1], nudged(last)) if isinstance(value, tuple) else nudged(last)

    def nudged(last):
        last = np.array(last, dtype=float)
        place = np.unravel_index(
            np.abs(np.nan_to_num(last, posinf=0, neginf=0)).argmax(), last.shape
        )
        last[place] *= 1 + 2e-6
        return last

    assert verdict(exercise, answer, 61).status == "failed"


# ------------------------------------------------------------------------------ probe functions


def made(kind, shape, rng):
    params = {
        "slope": rng.normal(size=shape),
        "offset": np.array(2.0),
        "matrix": rng.normal(size=(int(np.prod(shape)),) * 2),
        "centre": rng.normal(size=shape),
        "curve": rng.normal(size=shape),
        "third": rng.normal(size=shape),
        "height": rng.normal(size=shape),
        "phase": rng.normal(size=shape),
        "bend": rng.normal(size=shape),
        "weight": rng.normal(size=shape),
    }
    return Probe(kind, params)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"layer"}))
def test_a_probe_is_smooth_in_every_precision(kind, shape):
    rng = np.random.default_rng(3)
    f, x, v = made(kind, shape, rng), rng.normal(size=shape), rng.normal(size=shape)
    h = 1e-5
    slope = f(x + 1e-30j * v).imag / 1e-30
    assert (f(x + h * v) - f(x - h * v)) / (2 * h) == pytest.approx(slope, rel=1e-7, abs=1e-9)
    assert np.ndim(f(x)) == 0
    assert f(x.astype(np.longdouble)).dtype == np.longdouble
    assert float(f(x.astype(np.longdouble))) == pytest.approx(float(f(x)), rel=1e-13)
    assert f(x.copy(order="F")) == f(x)


def test_the_probe_that_takes_gradients_back_is_linear_and_keeps_the_shape():
    rng = np.random.default_rng(4)
    slope, one, other = rng.normal(size=(3, 3, 4))
    back = Probe("layer", {"slope": slope, "matrix": rng.normal(size=(4, 4))})
    assert back(one).shape == (3, 4)
    np.testing.assert_allclose(back(one - 2 * other), back(one) - 2 * back(other), rtol=1e-12)
    assert np.array_equal(decode(encode(back))(one), back(one))


def test_a_probe_cannot_be_changed_and_says_what_it_takes():
    slope = np.ones((2, 3))
    f = Probe("linear", {"slope": slope, "offset": np.array(0.0)})
    slope[0, 0] = 5
    assert f(np.ones((2, 3))) == 6
    with pytest.raises(ValueError, match="read-only"):
        f.params["slope"][0, 0] = 1
    with pytest.raises(ValueError, match=r"shape \(2, 3\); it was given \(6,\)"):
        f(np.ones(6))
    with pytest.raises(ValueError, match="kind: expected one of"):
        Probe("wave", {})
    assert f == Probe("linear", {"slope": np.ones((2, 3)), "offset": np.array(0.0)})
    assert f != Probe("linear", {"slope": np.ones((2, 3)), "offset": np.array(1.0)})
    assert SHAPED_LIKE.keys() == KINDS.keys()
