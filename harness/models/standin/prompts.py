"""How VLMEvalKit's wrapper of each family asks the questions of the five benchmarks: a stand-in learns its own form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from string import Formatter

from mqbench.harness.models.standin import tasks
from mqbench.harness.models.standin.tasks import Example

WORD_OR_PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
READ_CAREFULLY = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)


@dataclass(frozen=True)
class PromptStyle:
    """Templates over an example's question, hint and options.

    Attributes:
        vqa: TextVQA, DocVQA, and questions of the training alone.
        ocr: OCRBench.
        yes_no: MME.
        choice: ScienceQA; its ``{hint}`` is ``hint``, filled, or nothing.
        hint: What a hint becomes.
        before_image: Stands in front of the picture of ``vqa``.
    """

    vqa: str
    ocr: str
    yes_no: str
    choice: str
    hint: str
    before_image: str = ""

    def text(self, example: Example) -> str:
        """What stands behind the picture."""
        if example.subject:
            options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", example.options, strict=False))
            hint = self.hint.format(hint=example.hint) if example.hint else ""
            return self.choice.format(hint=hint, question=example.question, options=options)
        template = self.vqa if is_vqa(example) else self.yes_no if example.category in tasks.MME else self.ocr
        return template.format(question=example.question)

    def pieces(self) -> tuple[str, ...]:
        """Fixed stretches, each to be one piece of the tokenizer."""
        templates = (self.vqa, self.ocr, self.yes_no, self.choice, self.hint, self.before_image, "\nA. ")
        literals = {literal for template in templates for literal, _, _, _ in Formatter().parse(template)}
        return tuple(sorted(literal for literal in literals if len(literal) > 1))


def is_vqa(example: Example) -> bool:
    """Whether it is asked as TextVQA and DocVQA ask."""
    return not example.subject and example.category not in tasks.MME and example.category not in tasks.OCRBENCH


DATASETS = PromptStyle(
    vqa=f"{{question}}\n{WORD_OR_PHRASE}",
    ocr="{question}",
    yes_no="{question}",
    choice=(
        "{hint}Question: {question}\nOptions:\n{options}\nPlease select the correct answer from the options above. \n"
    ),
    hint="Hint: {hint}\n",
)
"""Of the datasets themselves, for wrappers that change nothing."""
LLAVA = replace(DATASETS, choice=f"{{hint}}{{question}}\n{{options}}\n{LETTER}", hint="{hint}\n")
INTERNVL = replace(LLAVA, ocr=LLAVA.vqa, yes_no=f"{{question}} {WORD_OR_PHRASE}")
MINICPM_V = replace(
    DATASETS,
    vqa="{question}",
    ocr=f"{READ_CAREFULLY}{{question}}",
    choice=f"{{hint}}Question: {{question}}\nOptions:\n{{options}}\n\n{LETTER}",
    before_image=WORD_OR_PHRASE,
)
