"""Chapter 7: an encoder block backward, embeddings, tied weights, and six blocks to mend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attn_lessons import feedforward, multihead, normalization
from attn_lessons import transformer as library
from attn_lessons.grading.catalogue import _blocks, ch04_multihead, ch06_residual_layernorm
from attn_lessons.grading.catalogue._blocks import by_complex_step, part
from attn_lessons.grading.catalogue._hunt import HUNTS
from attn_lessons.grading.catalogue._parts import named, quiet, right_factor, scattered
from attn_lessons.grading.exercise import Case, Exercise, Intermediate, Mistake
from attn_lessons.grading.relations import carried

CHAPTER = "ch07_encoder"
SHAPES = f"{CHAPTER}.html#ch07-shapes"
BLOCK = f"{CHAPTER}.html#ch07-block"
RESIDUAL = f"{CHAPTER}.html#ch07-residual"
NORMS = f"{CHAPTER}.html#ch07-norms"
BACKWARD = f"{CHAPTER}.html#ch07-backward"
EMBEDDING = f"{CHAPTER}.html#ch07-embedding"
PADDING = f"{CHAPTER}.html#ch07-padding"
TIED = f"{CHAPTER}.html#ch07-tied"

ATTENTION = multihead.WEIGHTS + multihead.BIASES
FEED_FORWARD = ("w1", "b1", "w2", "b2")
OF_LINEAR = dict(zip(FEED_FORWARD, library.FEED_FORWARD, strict=True))

Array = np.ndarray
Arrays = Mapping[str, Array]
Answer = Callable[..., Any]
Rng = np.random.Generator


# --- an encoder block: inputs --------------------------------------------------------------------


def _params(rng: Rng, c: int, f: int) -> dict[str, Array]:
    """Gains away from 1, biases away from 0."""
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{n}": (c, c) for n in multihead.WEIGHTS}
    shapes |= {f"self_attn.{n}": (c,) for n in multihead.BIASES}
    sizes = ((c, f), (f,), (f, c), (c,))
    shapes |= dict(zip(library.FEED_FORWARD, sizes, strict=True))
    params = {n: rng.normal(size=s) * (s[0] ** -0.5 if s[1:] else 0.5) for n, s in shapes.items()}
    # Logits of a few units: where one probability is 1, a right answer has lost digits too.
    params["self_attn.wq"] *= 0.8
    params["self_attn.wk"] *= 0.8
    for i in (1, 2):
        draw = rng.normal(size=c)
        params[f"norm{i}.weight"] = np.where(draw < 0, 0.6, 1.4) + 0.3 * draw
        params[f"norm{i}.bias"] = 0.5 * rng.normal(size=c)
    return params


def _encoder_cases(rng: Rng) -> list[Case]:
    def call(b: int, n: int, h: int, d: int, f: int, *rest: Any) -> tuple[Any, ...]:
        dout, x = rng.normal(size=(2, b, n, h * d))
        return (dout, 0.3 + 1.6 * x, _params(rng, h * d, f), h, *rest)

    def silent(*args: Any) -> tuple[Any, ...]:
        dout = np.zeros_like(args[0])
        dout[rng.integers(len(dout)), rng.integers(dout.shape[1])] = rng.normal(size=dout.shape[2])
        return (dout, *args[1:])

    def fresh(*args: Any) -> tuple[Any, ...]:
        flat = {n: np.ones_like(p) for n, p in args[2].items() if n.startswith("norm")}
        zero = {n: np.zeros_like(p) for n, p in args[2].items() if n.endswith(("bias", "bo"))}
        zero |= {f"self_attn.{n}": np.zeros_like(args[0][0, 0]) for n in ("bq", "bk", "bv")}
        return (*args[:2], args[2] | flat | zero, *args[3:])

    causal = np.tri(4, dtype=bool)
    padded = np.arange(5) < np.array([5, rng.integers(1, 3), 4])[:, None, None, None]
    dead = np.ones((2, 1, 4, 4), bool)
    dead[rng.integers(2), 0, rng.integers(4)] = False
    laid = [scattered(a) if isinstance(a, Array) else a for a in call(2, 3, 2, 3, 5, None, "pre")]
    return [
        Case("post-norm", call(1, 3, 2, 4, 11, None, "post"), hint="out = LN(a + ffn(a))."),
        Case("pre-norm", call(1, 3, 2, 4, 11, None, "pre"), hint="out = a + ffn(LN(a))."),
        Case(
            "a post-norm batch",
            call(2, 3, 2, 4, 5, None, "post"),
            hint="B 2, N 3, H 2, d 4, F 5: all different, but B and H.",
        ),
        Case("a pre-norm batch", call(2, 4, 3, 2, 7, None, "pre"), hint="B 2, N 4, H 3, d 2, F 7."),
        Case(
            "norm left out",
            call(2, 3, 2, 3, 5),
            hint="Without the argument, the block is post-norm.",
        ),
        Case("one head", call(2, 3, 1, 5, 4, None, "post"), hint="H = 1."),
        Case(
            "one token",
            call(3, 1, 2, 3, 5, None, "pre"),
            hint="N = 1: the only probability is 1, and no gradient reaches queries and keys.",
        ),
        Case(
            "causal mask",
            call(2, 4, 2, 3, 5, causal, "post"),
            hint="Token i sees the tokens 0 … i. True in the mask = may attend.",
        ),
        Case(
            "padding mask",
            call(3, 5, 2, 2, 7, padded, "pre"),
            hint="A mask (B, 1, 1, N): sentences of different length in one batch.",
        ),
        Case(
            "a query with nothing to attend to",
            call(2, 4, 3, 2, 5, dead, "post"),
            hint="A fully masked row: the token's skip path still goes on.",
        ),
        Case(
            "upstream in one token",
            silent(*call(2, 3, 2, 3, 5, None, "pre")),
            hint="The loss reads one token; it looked at all tokens of its sentence.",
        ),
        Case(
            "gains of 1 and biases of 0",
            fresh(*call(2, 3, 2, 4, 5, causal[:3, :3], "post")),
            hint="A block that is not trained yet.",
        ),
        Case("not contiguous in memory", tuple(laid), hint="The same numbers, laid out anew."),
    ]


# --- an encoder block: the oracle ----------------------------------------------------------------


def _encoder_by_complex_step(dout, x, params, n_heads, mask=None, norm="post"):
    """Every entry of x and of every parameter moved by i h: no backward pass."""

    def forward(given: Arrays) -> Array:
        own = part(given, "self_attn")
        ffn = {n: given[name] for n, name in OF_LINEAR.items()}
        h = given["x"]
        for i, sublayer in enumerate(
            (
                lambda y: _blocks.attention(y, y, own, n_heads, mask),
                lambda y: _blocks.feed_forward(y, **ffn),
            ),
            1,
        ):
            gain = given[f"norm{i}.weight"], given[f"norm{i}.bias"]
            if norm == "pre":
                h = h + sublayer(_blocks.layer_norm(h, *gain))
            else:
                h = _blocks.layer_norm(h + sublayer(h), *gain)
        return h

    found = by_complex_step(dout, {"x": x, **params}, forward)
    return found["x"], {name: found[name] for name in params}


# --- an encoder block, step by step --------------------------------------------------------------

NormBackward = Callable[..., Any]


def _attention_backward(dy, y, own, n_heads, mask):
    return multihead.multihead_backward(dy, y, **own, n_heads=n_heads, mask=mask)


def _ffn_backward(dy, y, weights):
    return feedforward.ffn_backward(dy, y, *weights)


def _sum(through: Array, past: Array) -> Array:
    return through + past


def _same(value: Any) -> Any:
    return value


def _norm_input(h: Array, normed: Array, total: Array, out: Array, post: bool) -> Array:
    return total if post else h


def _block(
    skips: tuple[Callable[..., Array], Callable[..., Array]] = (_sum, _sum),
    norms: tuple[NormBackward, NormBackward] = (normalization.layernorm_backward,) * 2,
    attend: Callable[..., Any] = _attention_backward,
    feed: Callable[..., Any] = _ffn_backward,
    kind: Callable[[str], str] = _same,
    norm_input: Callable[..., Array] = _norm_input,
    wrong_side: tuple[str, ...] = (),
    order: tuple[int, int] = (0, 1),
    passed_down: Callable[[Array, Array], Array] = lambda d, dout: d,
    ends: Callable[[dict[str, Array]], dict[str, Array]] = _same,
) -> Answer:
    """A right backward pass with some of its steps replaced."""

    def answer(dout, x, params, n_heads, mask=None, norm="post"):
        post = kind(norm) == "post"
        own: Any = {n: params[f"self_attn.{n}"] for n in ATTENTION}
        ffn = [params[n] for n in library.FEED_FORWARD]
        forwards: Any = (
            lambda y: multihead.multihead_forward(y, **own, n_heads=n_heads, mask=mask)[0],
            lambda y: feedforward.ffn_forward(y, *ffn)[0],
        )
        backwards: Any = (
            lambda dy, y: attend(dy, y, own, n_heads, mask),
            lambda dy, y: feed(dy, y, ffn),
        )
        steps, h = [], np.asarray(x)
        for i in order:
            gain = params[f"norm{i + 1}.weight"], params[f"norm{i + 1}.bias"]
            y = h if post else normalization.layernorm_forward(h, *gain)
            total = h + forwards[i](y)
            out = normalization.layernorm_forward(total, *gain) if post else total
            steps.append((i, y, norm_input(h, y, total, out, post)))
            h = out
        d, grads = np.asarray(dout), dict[str, Array]()
        for i, y, at in reversed(steps):
            d = passed_down(d, dout) if i != order[-1] else d
            gamma = params[f"norm{i + 1}.weight"]
            if post:
                ds, dgamma, dbeta = norms[i](d, at, gamma)
                through, found = backwards[i](ds, y)
                d = skips[i](through, d if "post" in wrong_side else ds)
            elif "pre" in wrong_side:
                dy, found = backwards[i](d, y)
                d, dgamma, dbeta = norms[i](skips[i](dy, d), at, gamma)
            else:
                dy, found = backwards[i](d, y)
                through, dgamma, dbeta = norms[i](dy, at, gamma)
                d = skips[i](through, d)
            names = OF_LINEAR if i else {n: f"self_attn.{n}" for n in ATTENTION}
            grads |= {names[n]: g for n, g in found.items()}
            grads |= {f"norm{i + 1}.weight": dgamma, f"norm{i + 1}.bias": dbeta}
        return d, ends(grads)

    return answer


def _forgotten(through: Array, past: Array) -> Array:
    return through


def _past_only(through: Array, past: Array) -> Array:
    return past


def _twice(through: Array, past: Array) -> Array:
    return through + 2 * past


def _either(change: Any, default: Any) -> tuple[tuple[Any, Any], ...]:
    """A change at the first place, at the second, at both."""
    return (change, default), (default, change), (change, change)


def _norm_skipped(dy: Array, x: Array, gamma: Array) -> tuple[Array, ...]:
    return (dy, *normalization.layernorm_backward(dy, x, gamma)[1:])


def _norm_as_gain(dy: Array, x: Array, gamma: Array) -> tuple[Array, ...]:
    return (gamma * dy, *normalization.layernorm_backward(dy, x, gamma)[1:])


def _norm_named(*ways: NormBackward) -> tuple[Answer, ...]:
    right = normalization.layernorm_backward
    return tuple(_block(norms=pair) for way in ways for pair in _either(way, right))


def _at_its_output(h: Array, normed: Array, total: Array, out: Array, post: bool) -> Array:
    return out if post else normed


def _at_the_sublayers_input(h: Array, normed: Array, total: Array, out: Array, post: bool) -> Array:
    return h


def _at_the_sum(h: Array, normed: Array, total: Array, out: Array, post: bool) -> Array:
    return total


def _exchanged_kind(norm: str) -> str:
    return "pre" if norm == "post" else "post"


def _exchanged_norms(grads: dict[str, Array]) -> dict[str, Array]:
    pairs = {f"norm{i}.{n}": f"norm{3 - i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
    return grads | {name: grads[other] for name, other in pairs.items()}


def _averaged(grads: dict[str, Array], over: int) -> dict[str, Array]:
    return {name: g / over for name, g in grads.items()}


def _mean_over_batch(dout, x, params, n_heads, mask=None, norm="post"):
    dx, grads = _block()(dout, x, params, n_heads, mask, norm)
    return dx, _averaged(grads, len(x))


def _branch_alone(dout, x, params, n_heads, mask=None, norm="post"):
    """Each sublayer sent what arrives at the block's output: as if they stood side by side."""
    return _block(passed_down=lambda d, dout: np.asarray(dout))(
        dout, x, params, n_heads, mask, norm
    )


def _carried_into_block() -> tuple[Mistake, ...]:
    """What mistaken multihead_backward, layernorm_backward and ffn_backward lead to."""

    def first(exercise: Exercise, names: tuple[str, ...]) -> list[Mistake]:
        by_name = {m.name: m for m in reversed(exercise.mistakes)}
        return [by_name[name] for name in names]

    def of_attention(mistake: Mistake) -> Answer:
        return _block(
            attend=lambda dy, y, own, h, mask: mistake.answer(dy, y, *own.values(), h, mask)
        )

    def of_norm(mistake: Mistake) -> Answer:
        return _block(norms=(mistake.answer, mistake.answer))

    def of_ffn(mistake: Mistake) -> Answer:
        return _block(feed=lambda dy, y, ffn: mistake.answer(dy, y, *ffn))

    rooms: tuple[tuple[Exercise, Callable[[Mistake], Answer], tuple[str, ...]], ...] = (
        (ch04_multihead.MULTIHEAD_EXERCISE, of_attention, FROM_MULTIHEAD),
        (ch06_residual_layernorm.LAYERNORM_BACKWARD_EXERCISE, of_norm, FROM_LAYERNORM),
        (ch06_residual_layernorm.FFN_BACKWARD, of_ffn, FROM_FFN),
    )
    return tuple(
        carried(mistake, exercise.id, quiet(answer(mistake)))
        for exercise, answer, names in rooms
        for mistake in first(exercise, names)
    )


FROM_MULTIHEAD = (
    "dx from one of q, k, v only",
    "last instead of summed",
    "one of the three paths forgotten",
    "scale by √C",
    "merge order in dwo",
    "bo forgotten",
)
FROM_LAYERNORM = (
    "mean term missing",
    "variance term missing",
    "mean and variance taken as constants",
    "gamma forgotten",
    "gamma applied last",
    "dgamma summed over batch only",
    "Bessel's correction",
)
FROM_FFN = ("tanh form", "activation gradient at the output")


# --- an encoder block: the first wrong value on the way ------------------------------------------


@quiet
def _on_the_way(dout, x, params, n_heads, mask=None, norm="post", **others):
    """What a right answer meets on the way back, by name, and what each was multiplied by."""
    seen: dict[str, Array] = {}

    def attend(dy, y, own, h, mask):
        _, cache = multihead.multihead_forward(y, **own, n_heads=h, mask=mask)
        dmerged = dy @ own["wo"].T
        given = {"dout": dy, "x": y, "n_heads": h, "mask": mask}
        inner = ch04_multihead._way(given | own)
        seen.update(dattn=dy, attention_input=y, merged=cache.merged, dmerged=dmerged)
        seen.update({n: inner[n] for n in ("dq", "dk", "dv")})
        return multihead.multihead_backward(dy, y, **own, n_heads=h, mask=mask)

    def feed(dy, y, ffn):
        _, cache = feedforward.ffn_forward(y, *ffn)
        dhidden = feedforward.gelu_backward(dy @ ffn[2].T, cache.hidden)
        seen.update(dffn=dy, ffn_input=y, active=cache.active, dhidden=dhidden)
        return feedforward.ffn_backward(dy, y, *ffn)

    _block(attend=attend, feed=feed)(dout, x, params, n_heads, mask, norm)
    return seen


def _met(name: str) -> Callable[..., Array]:
    return lambda **given: _on_the_way(**given)[name]


def _solved(rows: str) -> Callable[..., Array | None]:
    """dw = rowsᵀ dy, for the dy of every token."""

    def solve(dw: Array, **given: Any) -> Array | None:
        left = _on_the_way(**given)[rows]
        found = right_factor(left.reshape(-1, left.shape[-1]).T, dw)
        return None if found is None else found.reshape(*left.shape[:-1], -1)

    return solve


def _arrived(name: str, weight: str, rows: str) -> Intermediate:
    return Intermediate(name, _met(name), {f"grads['{weight}']": _solved(rows)})


ENCODER_WAY = (
    _arrived("dffn", "linear2.weight", "active"),
    _arrived("dhidden", "linear1.weight", "ffn_input"),
    _arrived("dattn", "self_attn.wo", "merged"),
    _arrived("dv", "self_attn.wv", "attention_input"),
    _arrived("dq", "self_attn.wq", "attention_input"),
    _arrived("dk", "self_attn.wk", "attention_input"),
)
ENCODER_ORDER = (
    *(
        f"grads['{name}']"
        for name in (
            "norm2.weight",
            "norm2.bias",
            "linear2.weight",
            "linear2.bias",
            "linear1.weight",
            "linear1.bias",
            "norm1.weight",
            "norm1.bias",
            *(f"self_attn.{n}" for n in ("wo", "bo", "wv", "bv", "wq", "bq", "wk", "bk")),
        )
    ),
    "dx",
)

ENCODER_EXERCISE = Exercise(
    id="encoder_block_backward",
    chapter=CHAPTER,
    title="An encoder block backward",
    points=5,
    returns=("dx", "grads"),
    reference=library.encoder_block_backward,
    oracle=_encoder_by_complex_step,
    cases=_encoder_cases,
    tokens=("dx",),
    intermediates=ENCODER_WAY,
    order=ENCODER_ORDER,
    mistakes=(
        *named(
            "first residual forgotten",
            "x reaches the first sum by two ways, through the attention and past it: both "
            "gradients add up in dx.",
            RESIDUAL,
            _block(skips=(_forgotten, _sum)),
        ),
        *named(
            "second residual forgotten",
            "a reaches the second sum by two ways, through the feed-forward layer and past it: "
            "both gradients add up before they go on to the attention.",
            RESIDUAL,
            _block(skips=(_sum, _forgotten)),
        ),
        *named(
            "both residuals forgotten",
            "Around each sublayer a skip path goes past it, and brings its gradient back whole.",
            RESIDUAL,
            _block(skips=(_forgotten, _forgotten)),
        ),
        *named(
            "a residual counted twice",
            "The skip path brings its gradient back once: where a sublayer's own backward pass "
            "has added it already, it is not added again.",
            RESIDUAL,
            *(_block(skips=pair) for pair in _either(_twice, _sum)),
        ),
        *named(
            "skip path only",
            "The gradient also comes back through the sublayer; past it is one of two ways.",
            RESIDUAL,
            *(_block(skips=pair) for pair in _either(_past_only, _sum)),
        ),
        *named(
            "norm gradient skipped",
            "What comes back to a norm's output goes through layernorm_backward before it goes "
            "on: its own input gets another gradient than its output.",
            NORMS,
            *_norm_named(_norm_skipped, _norm_as_gain),
        ),
        *named(
            "pre and post mixed",
            "In a post-norm block the norm comes after the sum, in a pre-norm block before the "
            "sublayer. Which one it is, norm says.",
            NORMS,
            _block(kind=lambda norm: "post"),
            _block(kind=lambda norm: "pre"),
            _block(kind=_exchanged_kind),
        ),
        *named(
            "skip path on the wrong side of the norm",
            "A pre-norm block's skip path goes past the norm, and its gradient too; a post-norm "
            "block's ends inside the norm: it starts from the gradient of the sum.",
            NORMS,
            _block(wrong_side=("pre",)),
            _block(wrong_side=("post",)),
            _block(wrong_side=("pre", "post")),
        ),
        *named(
            "norm at its output",
            "layernorm_backward takes what went into the norm, not what came out of it.",
            NORMS,
            _block(norm_input=_at_its_output),
        ),
        *named(
            "norm at the sublayer's input",
            "A post-norm block normalises the sum x + f(x): that is what layernorm_backward "
            "takes, not x.",
            NORMS,
            _block(norm_input=_at_the_sublayers_input),
        ),
        *named(
            "norm at the sum",
            "A pre-norm block normalises what goes into the sublayer, x: that is what "
            "layernorm_backward takes, not the sum x + f(LN(x)).",
            NORMS,
            _block(norm_input=_at_the_sum),
        ),
        *named(
            "mask forgotten in the backward pass",
            "The probabilities that the backward pass uses are those of the forward pass: "
            "computed again, they need the mask again.",
            BACKWARD,
            _block(
                attend=lambda dy, y, own, h, mask: multihead.multihead_backward(
                    dy, y, **own, n_heads=h
                )
            ),
            lambda dout, x, params, n_heads, mask=None, norm="post": _block()(
                dout, x, params, n_heads, None, norm
            ),
        ),
        *named(
            "first branch fed dout",
            "The branches stand one behind the other: what arrives at the attention's branch has "
            "come through the feed-forward branch.",
            BACKWARD,
            _branch_alone,
        ),
        *named(
            "feed-forward before attention",
            "The block attends first: out = branch(branch(x, attention), feed-forward).",
            BLOCK,
            _block(order=(1, 0)),
        ),
        *named(
            "gradients of the two norms exchanged",
            "norm1 belongs to the attention's branch, norm2 to the feed-forward one.",
            SHAPES,
            _block(ends=_exchanged_norms),
        ),
        *named(
            "parameters' gradients averaged over the batch",
            "Every sentence adds its share; a mean belongs to the loss, which has already divided.",
            BACKWARD,
            _mean_over_batch,
        ),
        *_carried_into_block(),
    ),
)


# --- embeddings ----------------------------------------------------------------------------------


def _embedding_calls(rng: Rng) -> list[tuple[str, tuple[Array, Array, int], str]]:
    """The cases of both exercises: name, arguments, hint."""

    def call(b: int, n: int, c: int, vocab: int, tokens: Array | None = None) -> Any:
        drawn = rng.integers(vocab, size=(b, n)) if tokens is None else tokens
        return rng.normal(size=(b, n, c)), drawn, vocab

    once = rng.permutation(9)[:6].reshape(2, 3)
    again = rng.permutation(9)[:4]
    inside = np.stack([again[[0, 1, 0, 2]], again[[3, 3, 3, 1]]])
    across = np.stack([rng.permutation(again), rng.permutation(again)])
    alike = np.full((2, 4), rng.integers(1, 5))
    ends = np.array([[0, 6, 0], [6, 0, 6]])
    dout, tokens, vocab = call(2, 5, 3, 7)
    return [
        ("no token twice", call(2, 3, 4, 9, once), "Every row of the table is used once or never."),
        (
            "repeated tokens",
            call(2, 4, 3, 9, inside),
            "A token that stands in a sentence twice uses the same row twice.",
        ),
        (
            "repeated across sentences",
            call(2, 4, 5, 9, across),
            "Two sentences of the same tokens use the same rows.",
        ),
        ("one token everywhere", call(2, 4, 3, 5, alike), "One row serves all places."),
        ("the first and the last row", call(2, 3, 4, 7, ends), "Tokens 0 and vocab - 1."),
        ("one sentence", call(1, 6, 2, 4), "B = 1."),
        ("one place", call(1, 1, 3, 5), "B = N = 1."),
        ("more rows than places", call(2, 3, 4, 31), "Rows that no token uses get 0."),
        ("as many rows as columns", call(3, 2, 5, 5), "vocab = C: shapes cannot help."),
        ("one column", call(2, 5, 1, 3), "C = 1."),
        (
            "not contiguous in memory",
            (scattered(dout), scattered(tokens), vocab),
            "The same numbers, laid out anew.",
        ),
        (
            "float32 input",
            (rng.normal(size=(2, 5, 3)).astype(np.float32), rng.integers(4, size=(2, 5)), 4),
            "Single precision in; single or double precision out.",
        ),
    ]


def _embedding_cases(rng: Rng) -> list[Case]:
    return [Case(name, args, hint=hint) for name, args, hint in _embedding_calls(rng)]


def _padded_cases(rng: Rng) -> list[Case]:
    cases = []
    for name, (dout, tokens, vocab), hint in _embedding_calls(rng):
        used = tokens.flat[rng.integers(tokens.size)]
        cases.append(Case(name, (dout, tokens, vocab, int(used)), hint=hint))
    dout, tokens = rng.normal(size=(2, 4, 3)), rng.integers(1, 6, size=(2, 4))
    never = "No token is the padding: its row is 0 anyway."
    cases.append(Case("padding that is not there", (dout, tokens, 6, 0), hint=never))
    tokens = np.array([[3, 1, 0, 0], [2, 0, 0, 0]])
    cases.append(
        Case("padding at the end", (dout, tokens, 6, 0), hint="Token 0 fills short sentences.")
    )
    return cases


def _embedding_by_one_hot(dout, tokens, vocab):
    """An embedding is a product with one-hot rows: the gradient is that of a product."""
    rows = (np.asarray(tokens).reshape(-1, 1) == np.arange(vocab)).astype(float)
    return rows.T @ np.asarray(dout, float).reshape(len(rows), -1)


def padded_embedding_backward(dout, tokens, vocab, padding):
    """embedding_backward with a row that is never trained."""
    return library.embedding_backward(dout, tokens, vocab, padding=padding)


def _padded_by_one_hot(dout, tokens, vocab, padding):
    table = _embedding_by_one_hot(dout, tokens, vocab)
    return np.where(np.arange(vocab)[:, None] == padding, 0.0, table)


def _places(dout, tokens):
    """Token and gradient, place by place."""
    return zip(np.ravel(tokens), np.reshape(dout, (-1, np.shape(dout)[-1])), strict=True)


def _assigned(dout, tokens, vocab):
    table = np.zeros((vocab, dout.shape[-1]))
    for token, row in _places(dout, tokens):
        table[token] = row
    return table


def _first_kept(dout, tokens, vocab):
    return _assigned(dout[::-1, ::-1], tokens[::-1, ::-1], vocab)


def _assigned_per_sentence(dout, tokens, vocab):
    """``table[tokens[b]] += dout[b]``: added over sentences, assigned within one."""
    return sum(_assigned(dout[b : b + 1], tokens[b : b + 1], vocab) for b in range(len(dout)))


def _assigned_per_place(dout, tokens, vocab):
    """``table[tokens[:, n]] += dout[:, n]``: assigned across the batch."""
    places = range(dout.shape[1])
    return sum(_assigned(dout[:, n : n + 1], tokens[:, n : n + 1], vocab) for n in places)


def _counted(tokens: Array, vocab: int) -> Array:
    return np.maximum(np.bincount(np.ravel(tokens), minlength=vocab), 1)[:, None]


def _mean_of_uses(dout, tokens, vocab):
    return _embedding_by_one_hot(dout, tokens, vocab) / _counted(tokens, vocab)


def _root_of_uses(dout, tokens, vocab):
    return _embedding_by_one_hot(dout, tokens, vocab) / np.sqrt(_counted(tokens, vocab))


def _row_zero_cleared(dout, tokens, vocab):
    table = _embedding_by_one_hot(dout, tokens, vocab)
    table[0] = 0
    return table


def _first_sentence(dout, tokens, vocab):
    return _embedding_by_one_hot(dout[:1], tokens[:1], vocab)


def _last_sentence(dout, tokens, vocab):
    return _embedding_by_one_hot(dout[-1:], tokens[-1:], vocab)


def _over(count: Callable[[Array], int]) -> Answer:
    return lambda dout, tokens, vocab: _embedding_by_one_hot(dout, tokens, vocab) / count(tokens)


def _packed(dout, tokens, vocab):
    """A row for each token that occurs, in their order."""
    table = _embedding_by_one_hot(dout, tokens, vocab)
    return table[np.unique(tokens)]


def _token_before(dout, tokens, vocab):
    return _embedding_by_one_hot(dout, (np.asarray(tokens) - 1) % vocab, vocab)


def _not_collected(dout, tokens, vocab):
    return np.array(dout, float)


def _standing_up(dout, tokens, vocab):
    return _embedding_by_one_hot(dout, tokens, vocab).T


def _root_of_width(dout, tokens, vocab):
    return _embedding_by_one_hot(dout, tokens, vocab) * np.shape(dout)[-1] ** 0.5


Way = tuple[str, str, tuple[Answer, ...]]
ACCUMULATED = (
    "Uses of the same row add up. `table[tokens] += dout` does not do that where a token is "
    "repeated: NumPy reads all rows first and writes the last one last. np.add.at does."
)
EMBEDDING_WAYS: tuple[Way, ...] = (
    ("assignment instead of accumulation", ACCUMULATED, (_assigned, _first_kept)),
    (
        "accumulated over one axis only",
        "Tokens repeat within a sentence and across sentences: every place adds its share, so "
        "`+=` with an array of tokens goes wrong over either axis.",
        (_assigned_per_sentence, _assigned_per_place),
    ),
    (
        "averaged over a token's uses",
        "A row's gradient is the sum over its uses, not their mean: a frequent token moves more.",
        (_mean_of_uses, _root_of_uses),
    ),
    (
        "divided by the number of sentences or tokens",
        "Where the loss is a mean, dout has it already.",
        (_over(len), _over(np.size), _over(lambda tokens: tokens.shape[1])),
    ),
    (
        "one sentence only",
        "The table is shared by all sentences of the batch.",
        (_first_sentence, _last_sentence),
    ),
    (
        "a row only for tokens that occur",
        "The gradient has the table's shape, (vocab, C): rows that no token uses are 0.",
        (_packed,),
    ),
    (
        "rows one off",
        "Token t uses row t, counted from 0.",
        (_token_before,),
    ),
    (
        "not collected into a table",
        "dout is the gradient by the rows as they were looked up, one a place; the table's rows "
        "collect them.",
        (_not_collected,),
    ),
    (
        "table transposed",
        "The table is (vocab, C): a row a token.",
        (_standing_up,),
    ),
    (
        "scaled by √C",
        "Nothing was scaled in this forward pass.",
        (_root_of_width,),
    ),
)

EMBEDDING_EXERCISE = Exercise(
    id="embedding_backward",
    chapter=CHAPTER,
    title="An embedding backward",
    points=2,
    returns=("dtable",),
    reference=library.embedding_backward,
    oracle=_embedding_by_one_hot,
    cases=_embedding_cases,
    mistakes=(
        *(m for name, why, ways in EMBEDDING_WAYS for m in named(name, why, EMBEDDING, *ways)),
        *named(
            "row 0 cleared unasked",
            "Token 0 is a token like the others, unless somebody says that it is padding.",
            PADDING,
            _row_zero_cleared,
        ),
    ),
)


def _with_padding_row(answer: Answer, cleared: bool = True) -> Answer:
    """An answer of embedding_backward, its padding row cleared afterwards."""

    def padded(dout, tokens, vocab, padding):
        table = np.array(answer(dout, tokens, vocab))
        if cleared and table.shape == (vocab, np.shape(dout)[-1]):
            table[padding] = 0
        return table

    return padded


def _padding_is_zero(dout, tokens, vocab, padding):
    return _row_zero_cleared(dout, tokens, vocab)


def _padding_is_last(dout, tokens, vocab, padding):
    table = _embedding_by_one_hot(dout, tokens, vocab)
    table[-1] = 0
    return table


def _place_for_token(dout, tokens, vocab, padding):
    """The place number ``padding`` of each sentence left out, rather than the token."""
    kept = np.array(dout, float)
    kept[:, padding : padding + 1] = 0
    return _embedding_by_one_hot(kept, tokens, vocab)


def _from_padding_on(dout, tokens, vocab, padding):
    """What follows the first padding left out: right only where padding ends a sentence."""
    met = np.cumsum(np.asarray(tokens) == padding, axis=1) > 0
    return _embedding_by_one_hot(np.where(met[..., None], 0, dout), tokens, vocab)


def _padding_nan(dout, tokens, vocab, padding):
    table = _embedding_by_one_hot(dout, tokens, vocab)
    table[padding] = np.nan
    return table


def _all_but_padding(dout, tokens, vocab, padding):
    table = np.zeros((vocab, np.shape(dout)[-1]))
    table[padding] = _embedding_by_one_hot(dout, tokens, vocab)[padding]
    return table


def _row_dropped(dout, tokens, vocab, padding):
    return np.delete(_embedding_by_one_hot(dout, tokens, vocab), padding, axis=0)


PADDED_EXERCISE = Exercise(
    id="padded_embedding_backward",
    chapter=CHAPTER,
    title="An embedding with padding",
    points=1,
    returns=("dtable",),
    reference=padded_embedding_backward,
    oracle=_padded_by_one_hot,
    cases=_padded_cases,
    mistakes=(
        *named(
            "padding row not zeroed",
            "The padding token's row is never trained: its gradient is 0, whatever dout holds at "
            "its places.",
            PADDING,
            _with_padding_row(_embedding_by_one_hot, cleared=False),
        ),
        *named(
            "padding taken to be token 0",
            "Which token is padding, the argument says.",
            PADDING,
            _padding_is_zero,
        ),
        *named(
            "padding taken to be the last token",
            "Which token is padding, the argument says.",
            PADDING,
            _padding_is_last,
        ),
        *named(
            "a place for a token",
            "padding is a token, that is a row of the table, not a place in the sentence.",
            PADDING,
            _place_for_token,
        ),
        *named(
            "all that follows padding left out",
            "Only the padding's own row is 0. Another token keeps its gradient wherever it stands.",
            PADDING,
            _from_padding_on,
        ),
        *named(
            "padding row NaN",
            "An optimizer adds the gradient: 0 leaves the row alone, NaN spoils it.",
            PADDING,
            _padding_nan,
        ),
        *named(
            "all but the padding zeroed",
            "The padding's row is the one that gets nothing.",
            PADDING,
            _all_but_padding,
        ),
        *named(
            "padding row removed",
            "The gradient has the table's shape: the padding's row stays, with zeros.",
            PADDING,
            _row_dropped,
        ),
        *(
            carried(
                Mistake(name, why, PADDING, ways[0]),
                "embedding_backward",
                quiet(_with_padding_row(ways[0])),
            )
            for name, why, ways in EMBEDDING_WAYS
            if name in ("assignment instead of accumulation", "averaged over a token's uses")
        ),
    ),
)


# --- tied weights --------------------------------------------------------------------------------


def _tied_cases(rng: Rng) -> list[Case]:
    def call(b: int, n: int, c: int, v: int, tokens: Array | None = None) -> tuple[Any, ...]:
        hidden, dembedded = rng.normal(size=(2, b, n, c))
        drawn = rng.integers(v, size=(b, n)) if tokens is None else tokens
        return rng.normal(size=(b, n, v)), hidden, rng.normal(size=(v, c)), dembedded, drawn

    silent = list(call(2, 4, 3, 5))
    silent[0] = np.zeros_like(silent[0])
    silent[0][rng.integers(2), rng.integers(4)] = rng.normal(size=5)
    laid = tuple(scattered(a) for a in call(2, 3, 4, 7))
    single = tuple(a.astype(np.float32) if a.dtype == float else a for a in call(2, 4, 3, 5))
    return [
        Case("one sentence", call(1, 3, 2, 5), hint="B = 1, N = 3, C = 2, V = 5."),
        Case("a batch", call(2, 3, 4, 7), hint="B 2, N 3, C 4, V 7: all different."),
        Case("as many tokens as columns", call(3, 2, 5, 5), hint="V = C: shapes cannot help."),
        Case("fewer tokens than columns", call(2, 5, 6, 3), hint="V = 3: most tokens repeat."),
        Case(
            "one token everywhere",
            call(2, 4, 3, 6, np.full((2, 4), rng.integers(6))),
            hint="One row is looked up at all places; as output every row is used at each.",
        ),
        Case(
            "no token twice",
            call(2, 3, 4, 9, rng.permutation(9)[:6].reshape(2, 3)),
            hint="Rows that are not looked up are used by the output all the same.",
        ),
        Case("one place", call(1, 1, 4, 3), hint="B = N = 1."),
        Case("one column", call(2, 3, 1, 4), hint="C = 1."),
        Case("as many sentences as places", call(3, 3, 2, 5), hint="B = N."),
        Case("a loss at one place", tuple(silent), hint="dlogits is 0 at all places but one."),
        Case("not contiguous in memory", laid, hint="The same numbers, laid out anew."),
        Case("float32 input", single, hint="Single precision in; single or double precision out."),
    ]


def _tied_by_loops(dlogits, hidden, table, dembedded, tokens):
    """Place by place: each adds to the row it looked up, and to every row that scored it."""
    table = np.asarray(table, float)
    dhidden, dtable = np.zeros(np.shape(hidden)), np.zeros(table.shape)
    for place in np.ndindex(*np.shape(tokens)):
        dtable[tokens[place]] += dembedded[place]
        for v, row in enumerate(table):
            dhidden[place] += dlogits[place][v] * row
            dtable[v] += dlogits[place][v] * np.asarray(hidden[place], float)
    return dhidden, dtable


def _tied(
    combined: Callable[[Array, Array, Array], Array],
    collect: Answer = _embedding_by_one_hot,
) -> Answer:
    """``combined(from output, from embedding, tokens)`` makes the table's gradient."""

    def answer(dlogits, hidden, table, dembedded, tokens):
        dhidden, of_output = _by_output(dlogits, hidden, table)
        return dhidden, combined(of_output, collect(dembedded, tokens, len(table)), tokens)

    return answer


def _by_output(dlogits: Array, hidden: Array, table: Array) -> tuple[Array, Array]:
    rows = np.reshape(dlogits, (-1, len(table)))
    return dlogits @ table, rows.T @ np.reshape(hidden, (-1, np.shape(table)[1]))


def _looked_up_last(of_output: Array, of_embedding: Array, tokens: Array) -> Array:
    used = np.isin(np.arange(len(of_output)), tokens)[:, None]
    return np.where(used, of_embedding, of_output)


def _dhidden_for_dembedded(dlogits, hidden, table, dembedded, tokens):
    dhidden, of_output = _by_output(dlogits, hidden, table)
    return dhidden, of_output + _embedding_by_one_hot(dhidden, tokens, len(table))


def _dembedded_for_hidden(dlogits, hidden, table, dembedded, tokens):
    dhidden, of_output = _by_output(dlogits, dembedded, table)
    return dhidden, of_output + _embedding_by_one_hot(dembedded, tokens, len(table))


def _looked_up_for_hidden(dlogits, hidden, table, dembedded, tokens):
    dhidden, of_output = _by_output(dlogits, table[tokens], table)
    return dhidden, of_output + _embedding_by_one_hot(dembedded, tokens, len(table))


def _table_not_transposed(dlogits, hidden, table, dembedded, tokens):
    _, dtable = _both()(dlogits, hidden, table, dembedded, tokens)
    return dlogits @ table.T, dtable


def _output_transposed(dlogits, hidden, table, dembedded, tokens):
    dhidden, of_output = _by_output(dlogits, hidden, table)
    return dhidden, of_output.T + _embedding_by_one_hot(dembedded, tokens, len(table))


def _dhidden_with_dembedded(dlogits, hidden, table, dembedded, tokens):
    dhidden, dtable = _both()(dlogits, hidden, table, dembedded, tokens)
    return dhidden + dembedded, dtable


def _both(collect: Answer = _embedding_by_one_hot) -> Answer:
    return _tied(lambda of_output, of_embedding, tokens: of_output + of_embedding, collect)


def _output_over_batch(dlogits, hidden, table, dembedded, tokens):
    """The output's contribution of one sentence."""
    dhidden, _ = _by_output(dlogits, hidden, table)
    _, of_output = _by_output(dlogits[-1:], hidden[-1:], table)
    return dhidden, of_output + _embedding_by_one_hot(dembedded, tokens, len(table))


def _output_averaged(dlogits, hidden, table, dembedded, tokens):
    dhidden, of_output = _by_output(dlogits, hidden, table)
    of_embedding = _embedding_by_one_hot(dembedded, tokens, len(table))
    return dhidden, of_output / len(dlogits) + of_embedding


TIED_EXERCISE = Exercise(
    id="tied_output_backward",
    chapter=CHAPTER,
    title="One table for input and output",
    points=3,
    returns=("dhidden", "dtable"),
    reference=library.tied_output_backward,
    oracle=_tied_by_loops,
    cases=_tied_cases,
    tokens=("dhidden",),
    mistakes=(
        *named(
            "output's contribution only",
            "The table is used twice, to look tokens up and to score them: what came back to the "
            "embedding is added to the rows that were looked up.",
            TIED,
            _tied(lambda of_output, of_embedding, tokens: of_output),
        ),
        *named(
            "embedding's contribution only",
            "The table is used twice, to look tokens up and to score them: as the output matrix "
            "it gets dlogitsᵀ hidden, at every row.",
            TIED,
            _tied(lambda of_output, of_embedding, tokens: of_embedding),
        ),
        *named(
            "contributions averaged",
            "Two uses of one array: their gradients are added.",
            TIED,
            _tied(lambda of_output, of_embedding, tokens: (of_output + of_embedding) / 2),
        ),
        *named(
            "embedding written over the output's",
            "`dtable[tokens] = …` replaces what the output has left in these rows: add to it.",
            TIED,
            _tied(_looked_up_last),
            _tied(
                lambda of_output, of_embedding, tokens: _looked_up_last(
                    of_output, of_embedding, tokens
                ),
                _assigned,
            ),
        ),
        *named(
            "one contribution subtracted",
            "Both contributions are gradients of the same loss: they are added.",
            TIED,
            _tied(lambda of_output, of_embedding, tokens: of_output - of_embedding),
            _tied(lambda of_output, of_embedding, tokens: of_embedding - of_output),
        ),
        *named(
            "dhidden for dembedded",
            "dhidden is the gradient at the model's top; the embedding gets what has come all the "
            "way down, dembedded.",
            TIED,
            _dhidden_for_dembedded,
        ),
        *named(
            "another array for hidden",
            "The logits are hidden times the table: the output's contribution is dlogitsᵀ hidden.",
            TIED,
            _dembedded_for_hidden,
            _looked_up_for_hidden,
        ),
        *named(
            "table not transposed",
            "logits = hidden tableᵀ, so dhidden = dlogits table: (B, N, V) times (V, C).",
            TIED,
            _table_not_transposed,
        ),
        *named(
            "output's contribution transposed",
            "dlogitsᵀ hidden is (V, C), as the table is; hiddenᵀ dlogits is the gradient of its "
            "transpose.",
            TIED,
            _output_transposed,
        ),
        *named(
            "dembedded added to dhidden",
            "The two stand at the two ends of the model; only their shapes are alike.",
            TIED,
            _dhidden_with_dembedded,
        ),
        *named(
            "output's contribution of one sentence",
            "Every sentence adds to the output matrix's gradient.",
            TIED,
            _output_over_batch,
        ),
        *named(
            "output's contribution averaged over the batch",
            "Where the loss is a mean, dlogits has it already.",
            TIED,
            _output_averaged,
        ),
        *(
            carried(
                Mistake(name, why, TIED, ways[0]),
                "embedding_backward",
                quiet(_both(ways[0])),
            )
            for name, why, ways in EMBEDDING_WAYS
            if name
            in (
                "assignment instead of accumulation",
                "accumulated over one axis only",
                "averaged over a token's uses",
                "rows one off",
            )
        ),
    ),
)

EXERCISES = (ENCODER_EXERCISE, EMBEDDING_EXERCISE, PADDED_EXERCISE, TIED_EXERCISE, *HUNTS)
