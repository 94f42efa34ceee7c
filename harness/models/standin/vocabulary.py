"""Words and sentence templates of the stand-in's tasks: data for the generator and for its tokenizer."""

from __future__ import annotations

from string import Formatter

from mqbench.harness.models.standin.render import COLORS, LANDMARKS, SHAPES, TEXTURES

LETTERS = "abcdefghijkmnpqrstuvwxyz"
DIGITS = "0123456789"
READABLE = LETTERS + DIGITS
_WORDS = """
act add age aim air arm art ask bad bag bay bed bet big bit bus buy cap cup cut dad dam den dew dig dip dry due eat
egg end era eve far fan fix fit fun gap gas gem get gum gym ham hat hen hid hug ice ink jam jar jet kit lab map mat
mix mud mug net nut pan pen pie pin pit ray rib rim run sad sea set sit six sky sun tea ten tie tin tip van vet war
way web wet wig win yes zip zap bark base bath beam bean bear beat bike bite cake camp card care cart case cave chat
chin dark date dear deep desk diet dish duck dust earn east easy edge face fact fair farm fast fire game gate gift
harp hand hard heat hint item jump just keep king mark meet mint name neat next page park path pink rain read rent
ride ring sand seat ship sing size
"""
COMMON_WORDS = tuple(_WORDS.split())
DOCUMENT_KEYS = ("sum", "day", "row", "id", "tax", "fee", "age", "bus")
FOREIGN_WORDS = {"kato": "cat", "hundo": "dog", "domo": "house", "arbo": "tree", "suno": "sun", "akvo": "water"}

# ScienceQA: closed facts by subject. Options are drawn from one category that answers and others that do not.
CATEGORIES: dict[str, dict[str, tuple[str, ...]]] = {
    "natural science": {
        "metal": ("iron", "copper", "silver", "nickel", "zinc", "lead"),
        "gas": ("oxygen", "helium", "neon", "argon", "methane", "ozone"),
        "mammal": ("horse", "whale", "rabbit", "monkey", "tiger", "mouse"),
        "planet": ("mars", "venus", "saturn", "jupiter", "neptune", "mercury"),
    },
    "social science": {
        "city": ("paris", "tokyo", "cairo", "london", "madrid", "lima"),
        "river": ("nile", "amazon", "danube", "ganges", "volga", "rhine"),
        "continent": ("africa", "asia", "europe", "australia", "antarctica", "oceania"),
        "coin": ("dollar", "euro", "yen", "peso", "rupee", "franc"),
    },
    "language science": {
        "verb": ("walks", "sings", "writes", "jumps", "speaks", "drinks"),
        "adjective": ("happy", "quick", "bright", "heavy", "gentle", "narrow"),
        "pronoun": ("she", "they", "them", "him", "ours", "myself"),
        "adverb": ("slowly", "often", "never", "loudly", "gladly", "soon"),
    },
}
RELATIONS: dict[str, tuple[str, str]] = {
    "natural science": ("The {a} is next to the {b}.", "Which one is next to the {a}?"),
    "social science": ("People trade {a} for {b}.", "Which one do people trade {a} for?"),
    "language science": ("The story has {a} before {b}.", "Which word comes after {a} in the story?"),
}
FACT_QUESTION = "Which of these is a {category}?"
FIGURE_QUESTIONS = {
    "natural science": ("Which color is shown in the figure?", tuple(COLORS)),
    "social science": ("Which building is shown in the figure?", LANDMARKS),
    "language science": ("Which shape does the figure name or show?", SHAPES),
}

VQA_SUFFIX = "\nPlease try to answer the question with short words or phrases if possible."
YES_NO_SUFFIX = " Please answer yes or no."
MCQ_SUFFIX = "\nPlease select the correct answer from the options above."
QUESTIONS = {
    "read": "what is written in the image?",
    "top": "what is written at the top?",
    "bottom": "what is written at the bottom?",
    "sign": "what is written on the {color} sign?",
    "field": "what is the {key} in this document?",
    "kie": "what is the value of '{key}'? Answer this question using the text in the image directly.",
    "number": "what is the number in the image?",
    "formula": "Please write out the expression of the formula in the image using LaTeX format.",
    "what_shape": "what shape is shown?",
    "what_color": "what color is the {shape}?",
    "how_many": "how many shapes are there?",
    "what_texture": "what texture is this?",
    "what_building": "what building is this?",
    "what_result": "what is the result?",
    "what_meaning": "what does this word mean?",
}
YES_NO_QUESTIONS = {
    "existence": "Is there a {shape} in this image?",
    "count": "Are there {number} shapes in this image?",
    "position": "Is the {a} {relation} the {b}?",
    "color": "Is the {shape} {color}?",
    "posters": 'Is the title of this poster "{text}"?',
    "celebrity": 'Is the person in this image named "{text}"?',
    "scene": "Does this scene show {texture}?",
    "landmark": "Is this a photo of a {landmark}?",
    "artwork": "Is this artwork made of the shape {shape}?",
    "OCR": 'Is the word in the logo "{text}"?',
    "commonsense_reasoning": "Is the {a} larger than the {b}?",
    "numerical_calculation": "Is the answer to the calculation in the image {number}?",
    "text_translation": "Is the word in the image translated as {meaning}?",
    "code_reasoning": "Does the code in the image print {number}?",
}
MME_VALUES: dict[str, tuple[str, str]] = {
    "existence": ("circle", "cross"),
    "count": ("one", "four"),
    "position": ("star", "square"),
    "color": ("red", "blue"),
    "posters": ("war", "tea"),
    "celebrity": ("king", "dad"),
    "scene": ("stripes", "dots"),
    "landmark": ("tower", "castle"),
    "artwork": ("triangle", "ring"),
    "OCR": ("zip", "hand"),
    "numerical_calculation": ("2", "8"),
    "text_translation": ("cat", "house"),
    "code_reasoning": ("4", "6"),
}
"""The two values that a category's pictures take and its questions name: a yes or no over two values is what so small
a model learns in an hour; matching any word with any picture is not."""
RELATION_WORDS = ("above", "below")
NUMBER_WORDS = ("one", "two", "three", "four")
MCQ_FRAME = ("Hint: ", "\nQuestion: ", "Question: ", "\nOptions:\nA. ", "\nB. ", "\nC. ", "\nD. ")


def words() -> list[str]:
    """Every word that is one piece of the tokenizer when it stands alone."""
    facts = [name for kinds in CATEGORIES.values() for name, members in kinds.items() for name in (name, *members)]
    listed = [*COLORS, *SHAPES, *TEXTURES, *LANDMARKS, *facts, *RELATION_WORDS, *NUMBER_WORDS, *DOCUMENT_KEYS]
    return sorted({*listed, *FOREIGN_WORDS.values(), "Yes", "No"})


def phrases() -> list[str]:
    """Every fixed stretch of the prompt templates, longest first."""
    templates = [*QUESTIONS.values(), *YES_NO_QUESTIONS.values(), FACT_QUESTION]
    templates += [text for pair in RELATIONS.values() for text in pair] + [
        question for question, _ in FIGURE_QUESTIONS.values()
    ]
    pieces = {literal for text in templates for literal, _, _, _ in Formatter().parse(text) if len(literal) > 1}
    pieces |= {VQA_SUFFIX, YES_NO_SUFFIX, MCQ_SUFFIX, *MCQ_FRAME}
    return sorted(pieces, key=lambda piece: (-len(piece), piece))
