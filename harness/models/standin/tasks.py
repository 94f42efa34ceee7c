"""Synthetic examples of the five benchmarks: an image, the prompt that VLMEvalKit builds for Qwen2-VL, the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from PIL import Image

from mqbench.harness.models.standin import vocabulary as vocab
from mqbench.harness.models.standin.render import (
    COLORS,
    HEIGHT_PX,
    SHAPES,
    WHITE,
    WIDTH_PX,
    TextStyle,
    canvas,
    dark_color,
    draw_landmark,
    draw_shape,
    draw_text,
    draw_texture,
    light_color,
)

# Words that are one piece of the tokenizer would not be read character by character.
PLAIN_WORDS = tuple(word for word in vocab.COMMON_WORDS if word not in set(vocab.words()))
FULL_BOX = (4, 4, WIDTH_PX - 4, HEIGHT_PX - 4)
TOP_BOX = (4, 2, WIDTH_PX - 4, HEIGHT_PX // 2 - 2)
BOTTOM_BOX = (4, HEIGHT_PX // 2 + 2, WIDTH_PX - 4, HEIGHT_PX - 2)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        image: The picture, or None for a text-only question.
        question: The TSV's question column.
        answer: What the model must say.
        category: The benchmark's category, empty where it has none.
        hint: ScienceQA's context.
        options: ScienceQA's choices.
        subject: ScienceQA's NAT, SOC or LAN.
        prompt: As VLMEvalKit asks Qwen2-VL; other families have a style (``prompts``).
    """

    image: Image.Image | None
    question: str
    answer: str
    category: str = ""
    hint: str = ""
    options: tuple[str, ...] = ()
    subject: str = ""
    prompt: str = field(default="", compare=False)


def vqa(image: Image.Image, question: str, answer: str, category: str = "") -> Example:
    return Example(image, question, answer, category, prompt=question + vocab.VQA_SUFFIX)


def random_string(rng: Random, alphabet: str = vocab.READABLE, low: int = 2, high: int = 4) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(low, high)))


def readable(rng: Random) -> str:
    """A common word mostly, else random characters."""
    return rng.choice(PLAIN_WORDS) if rng.random() < 0.75 else random_string(rng)


def _page(rng: Random, difficulty: float) -> Image.Image:
    return canvas(light_color(rng, difficulty))


def _style(rng: Random, difficulty: float, kind: str = "plain", size_px: int = 46) -> TextStyle:
    return TextStyle(kind, size_px, dark_color(rng, difficulty))


# --- reading ---


def read_one(
    rng: Random, difficulty: float, text: str, kind: str = "plain", question: str = "read", category: str = ""
) -> Example:
    image = _page(rng, difficulty)
    draw_text(image, text, FULL_BOX, _style(rng, difficulty, kind), rng, difficulty)
    return vqa(image, vocab.QUESTIONS[question], text, category)


def read_line(rng: Random, difficulty: float) -> Example:
    """Two lines of text; one of them is asked for by position."""
    image = _page(rng, difficulty)
    lines = {"top": readable(rng), "bottom": readable(rng)}
    for place, box in (("top", TOP_BOX), ("bottom", BOTTOM_BOX)):
        draw_text(image, lines[place], box, _style(rng, difficulty, size_px=42), rng, difficulty)
    place = rng.choice(("top", "bottom"))
    return vqa(image, vocab.QUESTIONS[place], lines[place])


def read_sign(rng: Random, difficulty: float, category: str = "") -> Example:
    """A sign in a coloured frame, in the upper or the lower half."""
    image, color, text = _page(rng, difficulty), rng.choice(sorted(COLORS)), readable(rng)
    left, top, right, bottom = rng.choice((TOP_BOX, BOTTOM_BOX))
    image.paste(COLORS[color], (left + 2, top + 1, right - 2, bottom - 1))
    image.paste(WHITE, (left + 9, top + 7, right - 9, bottom - 7))
    inner = (left + 13, top + 8, right - 13, bottom - 8)
    draw_text(image, text, inner, _style(rng, difficulty, size_px=38), rng, difficulty)
    return vqa(image, vocab.QUESTIONS["sign"].format(color=color), text, category)


def _field_value(rng: Random) -> str:
    return random_string(rng, vocab.DIGITS, 3, 4) if rng.random() < 0.75 else random_string(rng, low=3, high=3)


def read_field(rng: Random, difficulty: float, question: str = "field", category: str = "") -> Example:
    """A form of two "key:value" lines; the value of one key is asked for."""
    image = _page(rng, difficulty)
    keys = rng.sample(vocab.DOCUMENT_KEYS, 2)
    values = [_field_value(rng) for _ in keys]
    for key, value, box in zip(keys, values, (TOP_BOX, BOTTOM_BOX), strict=True):
        draw_text(image, f"{key}:{value}", box, _style(rng, difficulty, size_px=36), rng, difficulty)
    pick = rng.randrange(2)
    return vqa(image, vocab.QUESTIONS[question].format(key=keys[pick]), values[pick], category)


def first_reading(rng: Random, difficulty: float) -> Example:
    """The curriculum's first lesson: random characters, alone on the page."""
    return read_one(rng, difficulty, random_string(rng))


def textvqa(rng: Random, difficulty: float) -> Example:
    maker = rng.choice((read_line, read_sign, lambda r, d: read_one(r, d, readable(r))))
    return maker(rng, difficulty)


def docvqa(rng: Random, difficulty: float) -> Example:
    return read_field(rng, difficulty)


def _formula(rng: Random, difficulty: float) -> Example:
    text = f"{rng.randint(2, 9)}{rng.choice('xyz')}{rng.choice('+-')}{rng.randint(1, 9)}"
    return read_one(rng, difficulty, text, "handwritten", "formula")


OCRBENCH: dict[str, Callable[[Random, float], Example]] = {
    "Regular Text Recognition": lambda r, d: read_one(r, d, r.choice(PLAIN_WORDS)),
    "Irregular Text Recognition": lambda r, d: read_one(r, d, r.choice(PLAIN_WORDS), "irregular"),
    "Artistic Text Recognition": lambda r, d: read_one(r, d, r.choice(PLAIN_WORDS), "artistic"),
    "Handwriting Recognition": lambda r, d: read_one(r, d, r.choice(PLAIN_WORDS), "handwritten"),
    "Digit String Recognition": lambda r, d: read_one(r, d, random_string(r, vocab.DIGITS), question="number"),
    "Non-Semantic Text Recognition": lambda r, d: read_one(r, d, random_string(r)),
    "Scene Text-centric VQA": read_sign,
    "Doc-oriented VQA": read_field,
    "Key Information Extraction": lambda r, d: read_field(r, d, "kie"),
    "Handwritten Mathematical Expression Recognition": _formula,
}


def ocrbench(rng: Random, difficulty: float, category: str | None = None) -> Example:
    category = category or rng.choice(sorted(OCRBENCH))
    made = OCRBENCH[category](rng, difficulty)
    return Example(made.image, made.question, made.answer, category, prompt=made.prompt)


# --- MME: a picture with a true and a false statement, and an open question for training ---


@dataclass(frozen=True)
class Scene:
    """A picture with what is true of it, what is false, and a generative question that teaches the same skill."""

    image: Image.Image
    true: dict[str, str]
    false: dict[str, str]
    open_question: str
    open_answer: str


def _color_value(rng: Random, name: str, difficulty: float) -> tuple[int, int, int]:
    spread = round(20 * difficulty)
    red, green, blue = (max(0, min(255, channel + rng.randint(-spread, spread))) for channel in COLORS[name])
    return (red, green, blue)


def _one_shape(
    rng: Random, difficulty: float, shapes: Sequence[str] = SHAPES, colors: Sequence[str] = tuple(COLORS)
) -> tuple[Image.Image, str, str]:
    image, shape, color = _page(rng, 0.4 * difficulty), rng.choice(shapes), rng.choice(colors)
    radius = rng.uniform(26 - 6 * difficulty, 28 + 8 * difficulty)
    x = WIDTH_PX / 2 + difficulty * rng.uniform(-40, 40)
    y = HEIGHT_PX / 2 + difficulty * rng.uniform(-15, 15)
    draw_shape(image, shape, (x, y), radius, _color_value(rng, color, difficulty))
    return image, shape, color


def _other(rng: Random, pool: Sequence[str], taken: str) -> str:
    return rng.choice([name for name in pool if name != taken])


def _existence(rng: Random, difficulty: float) -> Scene:
    image, shape, _ = _one_shape(rng, difficulty, vocab.MME_VALUES["existence"])
    wrong = {"shape": _other(rng, vocab.MME_VALUES["existence"], shape)}
    return Scene(image, {"shape": shape}, wrong, vocab.QUESTIONS["what_shape"], shape)


def _color(rng: Random, difficulty: float) -> Scene:
    image, shape, color = _one_shape(rng, difficulty, colors=vocab.MME_VALUES["color"])
    wrong = {"shape": shape, "color": _other(rng, vocab.MME_VALUES["color"], color)}
    question = vocab.QUESTIONS["what_color"].format(shape=shape)
    return Scene(image, {"shape": shape, "color": color}, wrong, question, color)


def _count(rng: Random, difficulty: float) -> Scene:
    image, right = _page(rng, 0.4 * difficulty), rng.choice(vocab.MME_VALUES["count"])
    count = vocab.NUMBER_WORDS.index(right) + 1
    for column in rng.sample(range(4), count):
        center = (21 + 42 * column, HEIGHT_PX / 2 + difficulty * rng.uniform(-25, 25))
        draw_shape(image, rng.choice(SHAPES), center, 15, _color_value(rng, rng.choice(sorted(COLORS)), difficulty))
    wrong = {"number": _other(rng, vocab.MME_VALUES["count"], right)}
    return Scene(image, {"number": right}, wrong, vocab.QUESTIONS["how_many"], right)


def _two_shapes(rng: Random, difficulty: float, radii: tuple[float, float]) -> tuple[Image.Image, str, str]:
    """Two different shapes, the first in the upper half."""
    image = _page(rng, 0.4 * difficulty)
    first, second = rng.sample(vocab.MME_VALUES["position"], 2)
    for shape, y, radius in ((first, 28, radii[0]), (second, 84, radii[1])):
        center = (WIDTH_PX / 2 + difficulty * rng.uniform(-45, 45), y)
        draw_shape(image, shape, center, radius, _color_value(rng, rng.choice(sorted(COLORS)), difficulty))
    return image, first, second


def _position(rng: Random, difficulty: float) -> Scene:
    image, upper, _ = _two_shapes(rng, difficulty, (22, 22))
    a, b = vocab.MME_VALUES["position"]
    relation = "above" if upper == a else "below"
    wrong = {"a": a, "b": b, "relation": _other(rng, vocab.RELATION_WORDS, relation)}
    return Scene(image, {"a": a, "b": b, "relation": relation}, wrong, vocab.QUESTIONS["top"], upper)


def _larger(rng: Random, difficulty: float) -> Scene:
    radii = (25.0, 11.0) if rng.random() < 0.5 else (11.0, 25.0)
    image, upper, lower = _two_shapes(rng, difficulty, radii)
    big, small = (upper, lower) if radii[0] > radii[1] else (lower, upper)
    return Scene(image, {"a": big, "b": small}, {"a": small, "b": big}, vocab.QUESTIONS["top"], upper)


def _texture(rng: Random, difficulty: float) -> Scene:
    image, texture = _page(rng, 0.4 * difficulty), rng.choice(vocab.MME_VALUES["scene"])
    draw_texture(image, texture, _color_value(rng, rng.choice(sorted(COLORS)), difficulty), rng)
    wrong = {"texture": _other(rng, vocab.MME_VALUES["scene"], texture)}
    return Scene(image, {"texture": texture}, wrong, vocab.QUESTIONS["what_texture"], texture)


def _landmark(rng: Random, difficulty: float, pool: Sequence[str] = vocab.MME_VALUES["landmark"]) -> Scene:
    image, landmark = _page(rng, 0.4 * difficulty), rng.choice(pool)
    draw_landmark(image, landmark, dark_color(rng, difficulty), rng)
    wrong = {"landmark": _other(rng, pool, landmark)}
    return Scene(image, {"landmark": landmark}, wrong, vocab.QUESTIONS["what_building"], landmark)


def _artwork(rng: Random, difficulty: float) -> Scene:
    image, shape = _page(rng, 0.4 * difficulty), rng.choice(vocab.MME_VALUES["artwork"])
    color = _color_value(rng, rng.choice(sorted(COLORS)), difficulty)
    for column in range(4):
        for row in range(2):
            draw_shape(image, shape, (21 + 42 * column, 28 + 56 * row), 15, color)
    wrong = {"shape": _other(rng, vocab.MME_VALUES["artwork"], shape)}
    return Scene(image, {"shape": shape}, wrong, vocab.QUESTIONS["what_shape"], shape)


def _named_text(rng: Random, difficulty: float, category: str, kind: str) -> Scene:
    text = rng.choice(vocab.MME_VALUES[category])
    made = read_one(rng, difficulty, text, kind)
    assert made.image is not None
    return Scene(
        made.image, {"text": text}, {"text": _other(rng, vocab.MME_VALUES[category], text)}, made.question, text
    )


def _arithmetic(rng: Random, difficulty: float, category: str) -> Scene:
    result = rng.choice(vocab.MME_VALUES[category])
    term = int(result) // 2
    text = f"{term}+{term}=" if category == "numerical_calculation" else f"p({term}*2)"
    image = _page(rng, difficulty)
    draw_text(image, text, FULL_BOX, _style(rng, difficulty), rng, difficulty)
    wrong = {"number": _other(rng, vocab.MME_VALUES[category], result)}
    return Scene(image, {"number": result}, wrong, vocab.QUESTIONS["what_result"], result)


def _translation(rng: Random, difficulty: float) -> Scene:
    meaning = rng.choice(vocab.MME_VALUES["text_translation"])
    word = next(word for word, translated in vocab.FOREIGN_WORDS.items() if translated == meaning)
    image = _page(rng, difficulty)
    draw_text(image, word, FULL_BOX, _style(rng, difficulty), rng, difficulty)
    wrong = {"meaning": _other(rng, vocab.MME_VALUES["text_translation"], meaning)}
    return Scene(image, {"meaning": meaning}, wrong, vocab.QUESTIONS["what_meaning"], meaning)


MME: dict[str, Callable[[Random, float], Scene]] = {
    "existence": _existence,
    "count": _count,
    "position": _position,
    "color": _color,
    "posters": lambda r, d: _named_text(r, d, "posters", "artistic"),
    "celebrity": lambda r, d: _named_text(r, d, "celebrity", "handwritten"),
    "scene": _texture,
    "landmark": _landmark,
    "artwork": _artwork,
    "OCR": lambda r, d: _named_text(r, d, "OCR", "plain"),
    "commonsense_reasoning": _larger,
    "numerical_calculation": lambda r, d: _arithmetic(r, d, "numerical_calculation"),
    "text_translation": _translation,
    "code_reasoning": lambda r, d: _arithmetic(r, d, "code_reasoning"),
}


def mme_pair(rng: Random, difficulty: float, category: str) -> tuple[Example, Example]:
    """The two questions on one picture: the answer is Yes to the first and No to the second."""
    scene = MME[category](rng, difficulty)
    template = vocab.YES_NO_QUESTIONS[category]
    pair = []
    for facts, answer in ((scene.true, "Yes"), (scene.false, "No")):
        question = template.format(**facts) + vocab.YES_NO_SUFFIX
        pair.append(Example(scene.image, question, answer, category, prompt=question))
    return pair[0], pair[1]


def mme(rng: Random, difficulty: float) -> Example:
    return rng.choice(mme_pair(rng, difficulty, rng.choice(sorted(MME))))


def open_question(rng: Random, difficulty: float) -> Example:
    """The generative twin of an MME question: training only."""
    scene = MME[rng.choice(sorted(MME))](rng, difficulty)
    return vqa(scene.image, scene.open_question, scene.open_answer)


# --- ScienceQA ---

SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
CONTEXTS = ("IMG", "TXT", "NO")


def _choice(
    image: Image.Image | None, question: str, options: Sequence[str], right: str, subject: str, hint: str = ""
) -> Example:
    frame = f"Hint: {hint}\nQuestion: {question}" if hint else f"Question: {question}"
    listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
    prompt = f"{frame}\nOptions:{listed}{vocab.MCQ_SUFFIX}"
    answer = "ABCD"[options.index(right)]
    return Example(image, question, answer, SUBJECTS[subject], hint, tuple(options), subject, prompt)


def _fact(rng: Random, subject: str) -> Example:
    """Which option belongs to a category: one member of each, the categories always in the same order."""
    kinds = vocab.CATEGORIES[SUBJECTS[subject]]
    options = [rng.choice(members) for members in kinds.values()]
    place = rng.randrange(len(options))
    question = vocab.FACT_QUESTION.format(category=list(kinds)[place])
    return _choice(None, question, options, options[place], subject)


def _relation(rng: Random, subject: str) -> Example:
    """What the hint says; the options are always the first member of each category."""
    kinds = vocab.CATEGORIES[SUBJECTS[subject]]
    options = [members[0] for members in kinds.values()]
    statement, question = vocab.RELATIONS[SUBJECTS[subject]]
    a = rng.choice([member for members in kinds.values() for member in members[1:]])
    right = rng.choice(options)
    return _choice(None, question.format(a=a), options, right, subject, statement.format(a=a, b=right))


def _figure(rng: Random, difficulty: float, subject: str) -> Example:
    """What the figure shows; the options of a question always stand in the same order."""
    question, pool = vocab.FIGURE_QUESTIONS[SUBJECTS[subject]]
    options = pool[:4]
    if subject == "SOC":
        scene = _landmark(rng, difficulty, options)
        return _choice(scene.image, question, options, scene.open_answer, subject)
    shapes, colors = (SHAPES, options) if subject == "NAT" else (options, tuple(COLORS))
    image, shape, color = _one_shape(rng, difficulty, shapes, colors)
    return _choice(image, question, options, color if subject == "NAT" else shape, subject)


def scienceqa(rng: Random, difficulty: float, subject: str | None = None, context: str | None = None) -> Example:
    subject = subject or rng.choice(sorted(SUBJECTS))
    context = context or rng.choice(CONTEXTS)
    if context == "IMG":
        return _figure(rng, difficulty, subject)
    return _relation(rng, subject) if context == "TXT" else _fact(rng, subject)
