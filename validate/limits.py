"""How far an artifact may be from its reference: what rounding explains, by recipe.

A palette's indices count as integers: what is computed with its weights is not rounded, either.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from ..quantize.recipes import EMBEDDING, Activations, Float, Precision, Recipe

CHANCE = 3
"""Tokens of all images together that may be others by chance, whatever their number."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Over all images together: what a rounded artifact is held to, and what a run of one showed.

    `features_rms` and `logits_rms` are RMS of the difference in parts of the reference's RMS,
    `features_noise` in parts of its peak, `mean_kl` is in nats, `tokens` is the share of positions
    with another most likely token.
    """

    features_rms: float
    features_noise: float
    logits_rms: float
    mean_kl: float
    tokens: float

    def share(self, positions: int) -> float:
        """The share of so many positions whose most likely token may be another."""
        return min(1.0, self.tokens + CHANCE / max(positions, 1))

    def worst(self, other: "Statistics") -> "Statistics":
        """The larger of each; what is not finite counts as nothing."""
        return self._larger(Statistics(**{k: _finite(v) for k, v in asdict(other).items()}))

    def times(self, amplitudes: float) -> "Statistics":
        """Each of them scaled with the size of the disturbance; KL grows with its square."""
        return Statistics(
            features_rms=self.features_rms * amplitudes,
            features_noise=self.features_noise * amplitudes,
            logits_rms=self.logits_rms * amplitudes,
            mean_kl=self.mean_kl * amplitudes**2,
            tokens=self.tokens * amplitudes,
        )

    def _larger(self, other: "Statistics") -> "Statistics":
        ours, theirs = asdict(self), asdict(other)
        return Statistics(**{name: max(ours[name], theirs[name]) for name in ours})


NOTHING = Statistics(features_rms=0.0, features_noise=0.0, logits_rms=0.0, mean_kl=0.0, tokens=0.0)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a candidate may be from its reference. Each is an upper bound.

    `pixels` is in steps of 1/255; `features`, `embeddings` and `logits` are the worst difference in
    parts of the reference's peak; `features_rms` and `logits_rms` are RMS of the difference in
    parts of the reference's RMS, `features_noise` in parts of its peak, which is 10^(-PSNR / 20):
    3.2e-3 are 50 dB; `cosine` is 1 - cosine of the worst image token; `worst_kl` and
    `mean_kl` are in nats; `answers` is the share of the bundled task's questions that may be
    answered otherwise. `tokens` may differ in each case beside ties, which are tokens whose logits
    lie within twice `tie` of the peak: see `Tie`.

    An infinite limit judges nothing but that the value is finite. It stands where roundings make
    the worst value a matter of chance; there `statistics` judges all images together.
    """

    pixels: float
    features: float
    features_rms: float
    features_noise: float
    cosine: float
    embeddings: float
    logits: float
    logits_rms: float
    worst_kl: float
    mean_kl: float
    answers: float
    tie: float
    tokens: float = 0.0
    statistics: Statistics | None = None

    def looser(self, other: "Limits") -> "Limits":
        """Field by field the larger of both; the statistics are this one's."""
        numbers = [field.name for field in fields(Limits) if field.name != "statistics"]
        largest = {name: max(getattr(self, name), getattr(other, name)) for name in numbers}
        return replace(self, **largest)

    @property
    def rounded(self) -> bool:
        """Whether roundings decide what single logits are."""
        return self.statistics is not None


# Both sides compute in float32 and only the order of sums differs (folded convolutions, fused
# attention, other matrix kernels). One rounding is 6e-8 of a value; through 30-odd tower layers and
# 24 decoder layers it grows to some 1e-6 to 2e-5 of the peak, so 1e-4 leaves room for depth and
# none for a mistake. RMS over RMS is of the same size. Logits that move by 1e-4 of a peak of 30
# shift KL by at most (3e-3)^2 / 2 = 5e-6. Pixels and the embedding table involve no sums: equal.
# An RMS of 1e-4 of the RMS, let alone of the peak, is a PSNR of 80 dB.
FLOAT32 = Limits(
    pixels=0.0,
    features=1e-4,
    features_rms=1e-4,
    features_noise=1e-4,
    cosine=1e-7,
    embeddings=0.0,
    logits=1e-4,
    logits_rms=1e-4,
    worst_kl=1e-5,
    mean_kl=2e-6,
    answers=0.0,
    tie=1e-4,
)

# The integers and scales are the reference's own and the sums stay in float32. Integer times scale
# is one more rounding where a runtime multiplies in another order, so a row of the table may differ
# in its last bit or two.
INTEGER_WEIGHTS = replace(FLOAT32, embeddings=1e-6)


def _together(least: Statistics, *, embeddings: float, tie: float) -> Limits:
    """Limits that judge single values by being finite alone, and all images by their statistics."""
    return Limits(
        pixels=0.0,
        features=math.inf,
        features_rms=math.inf,
        features_noise=math.inf,
        cosine=math.inf,
        embeddings=embeddings,
        logits=math.inf,
        logits_rms=math.inf,
        worst_kl=math.inf,
        mean_kl=math.inf,
        answers=0.02,
        tie=tie,
        tokens=math.inf,
        statistics=least,
    )


# The statistics below are the least that an artifact may differ by. A model that amplifies
# roundings more is given what its own reference is seen to move by: see `rounding_floor`.
#
# One rounding to half precision is 2^-11 = 4.9e-4 of a value, and each side rounds in other places:
# a runtime that fuses two operators rounds once. Through 30-odd layers of a few operators each,
# independent errors of 4.9e-4 / sqrt(3) grow with the root of their number to some 3e-3 in RMS;
# 4.4e-3 was seen in the logits of the 0.5B with random weights. The limits are about twice that.
# Logits of RMS 5 that move by 1e-2 of it shift KL by (5e-2)^2 / 2 = 1e-3 in the mean. A gathered
# row is copied, so the table stays equal. Features have peaks of three times their RMS and more,
# which makes a PSNR of at least 50 dB.
FLOAT16 = _together(
    Statistics(
        features_rms=1e-2,
        features_noise=10 ** (-50 / 20),
        logits_rms=1e-2,
        mean_kl=1e-3,
        tokens=0.02,
    ),
    embeddings=0.0,
    tie=2e-2,
)

# bfloat16 has three bits less: one rounding is 2^-8, eight times float16's, and so are the errors
# that it grows to; KL is their square. On the bundled model PyTorch's own bfloat16 kernels differ
# from their meaning in float32 by 7e-3 (features) and 1.8e-2 (logits) in RMS and 3e-4 (KL), about
# eight times what float16 shows; deeper models need room.
BFLOAT16 = _together(
    Statistics(
        features_rms=8e-2,
        features_noise=8 * 10 ** (-50 / 20),
        logits_rms=8e-2,
        mean_kl=5e-2,
        tokens=0.05,
    ),
    embeddings=0.0,
    tie=0.16,
)

_FLOATS = {Float.FP32: FLOAT32, Float.FP16: FLOAT16, Float.BF16: BFLOAT16}

# An activation that is off by d lands on the other side of a rounding boundary in d / step of all
# cases and is then off by a whole step, 1/255 of its range. So rounding turns errors of size d into
# sqrt(d * step), and after a few layers the last bit of a float32 sum has become a good part of the
# rounding noise itself. That is no fault of an artifact: the bundled model's int8 reference against
# itself, inputs moved by 2e-7, shows 2.2e-2 (features, RMS), 6e-2 (logits, RMS) and 9e-4 (mean KL),
# and ONNX Runtime 2.0e-2 and 4.1e-2; end to end, where the tower's flips meet the decoder's, mean
# KL is 1.8e-3. The limits are two to three times that.
#
# fp8's steps are wider (2^-4 of a value), but come with bfloat16's: the bundled model under `fp8`,
# with PyTorch's bfloat16 kernels instead of their meaning in float32, shows half of what both sets
# allow, or less.
INTEGER_ACTIVATIONS = _together(
    Statistics(features_rms=5e-2, features_noise=5e-2, logits_rms=0.12, mean_kl=5e-3, tokens=0.02),
    embeddings=1e-6,
    tie=6e-2,
)


def limits_for(recipe: Recipe) -> Limits:
    """The limits of an artifact against the recipe's eager reference.

    Image features are held to what the tower's precisions explain, embeddings to the table's,
    logits and answers to all of them.
    """
    # A pattern that names the decoder matches no layer of the tower; any other may.
    rules = [r.precision for r in recipe.layers if not r.pattern.startswith("decoder.")]
    tower = _loosest(recipe, [recipe.vision, *rules])
    table = _loosest(recipe, [recipe.precision(EMBEDDING)])
    found = _loosest(recipe, recipe.precisions)
    if found.statistics:
        features = tower.statistics or tower
        statistics = replace(
            found.statistics,
            features_rms=features.features_rms,
            features_noise=features.features_noise,
        )
        found = replace(found, statistics=statistics)
    return replace(
        found,
        features=tower.features,
        features_rms=tower.features_rms,
        features_noise=tower.features_noise,
        cosine=tower.cosine,
        embeddings=table.embeddings,
    )


# Nothing is rounded but float32's last bit. Between PyTorch's own kernels 3e-7 to 5e-7 was seen on
# the bundled model, 4.3e-6 at worst on the 0.5B with random weights; against ONNX Runtime's, 1.4e-6
# and 5.7e-6; deeper models need some room. That is for bundles from other machines. Where the same
# programs are at hand the limits are measured, see `exact_floor`: one GELU by tanh moves the
# bundled model's features by no more than 2e-5.
EXACT = replace(
    FLOAT32,
    features=4e-5,
    features_rms=4e-5,
    features_noise=4e-5,
    logits=4e-5,
    logits_rms=4e-5,
    worst_kl=1e-6,
    mean_kl=2e-7,
)


def exact_limits(recipe: Recipe) -> Limits:
    """The limits of an artifact where neither it nor its reference rounds anything to half or int.

    Both compute the same real numbers then, under every recipe; only an integer times its scale may
    be rounded in another order.
    """
    return replace(EXACT, embeddings=min(limits_for(recipe).embeddings, INTEGER_WEIGHTS.embeddings))


def _loosest(recipe: Recipe, precisions: Iterable[Precision]) -> Limits:
    """The largest of each limit over what is rounded."""
    kinds = [_FLOATS[recipe.float_format]]
    for precision in precisions:
        if precision.bits is not None:
            floating = precision.activations is Activations.FLOAT
            kinds.append(INTEGER_WEIGHTS if floating else INTEGER_ACTIVATIONS)
    statistics = None
    for kind in kinds:
        if kind.statistics:
            statistics = kind.statistics.worst(statistics or NOTHING)
    loosest = kinds[0]
    for kind in kinds[1:]:
        loosest = loosest.looser(kind)
    return replace(loosest, statistics=statistics)
