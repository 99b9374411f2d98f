"""Classes of images."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, Image
from transformers import AutoModelForImageClassification, DefaultDataCollator

from ...errors import RecipeError
from ...hf.auto import load, load_image_processor
from ...hf.trainer.teacher_cache import batches_of
from ..data import LabelledExamples, load_images
from ..metrics import Predicts, build_metrics
from ..task import TASKS, Setup
from .labelled import LabelledTask


@TASKS.register("image-classification")
class ImageClassification(LabelledTask):
    """A head with one output for each class of the data; the images are prepared by the processor of the model."""

    def default_arguments(self) -> dict[str, Any]:
        return {"remove_unused_columns": False}  # the images, which are prepared batch by batch

    def check_model(self, section: Any) -> None:
        if section.num_labels == 1:
            raise RecipeError("model.num_labels: 1 is a regression, which model.task image-classification has not")

    def predicts(self, section: Any) -> Predicts:
        return "class"

    def load_examples(self, recipe: Any) -> LabelledExamples:
        return load_images(recipe.data)

    def load_model(self, recipe: Any, examples: LabelledExamples) -> tuple[Any, Any]:
        section = recipe.model
        revision = section.revision or "main"
        build_metrics(recipe.metric, self.predicts(section))  # refused before the model is loaded
        processor = load_image_processor(section.name, revision)
        return self.load_head(section, examples), processor

    def load_head(self, section: Any, examples: LabelledExamples) -> Any:
        """Load the model with a head for the classes of the data; one for other classes is made anew.

        Raises:
            RecipeError: if it cannot be loaded, or is to have another number of classes than the data.
        """
        if section.num_labels not in (None, len(examples.names)):
            raise RecipeError(
                f"model.num_labels is {section.num_labels}, but the training examples have {len(examples.names)} "
                f"classes: {', '.join(examples.names)}"
            )
        return load(
            AutoModelForImageClassification,
            section.name,
            section.revision or "main",
            id2label=dict(enumerate(examples.names)),
            label2id={name: number for number, name in enumerate(examples.names)},
            ignore_mismatched_sizes=True,
            **self.options(section),
        )

    def collator(self, setup: Setup) -> Any:
        return DefaultDataCollator()

    def datasets(self, setup: Setup) -> tuple[Dataset, Dataset]:
        train, validation = (
            _prepared(split, setup.tokenizer, setup.examples.text_columns[0])
            for split in (setup.examples.train, setup.examples.validation)
        )
        return train, validation

    def teacher_batches(self, setup: Setup) -> Any:
        train = _prepared(setup.examples.train, setup.tokenizer, setup.examples.text_columns[0])
        return batches_of(train, self.collator(setup), ("pixel_values",), setup.arguments.eval_batch_size)


def _prepared(dataset: Dataset, processor: Any, column: str) -> Dataset:
    """Return images as the model takes them, each prepared when it is read."""
    reader = Image()

    def prepare(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [reader.decode_example(stored).convert("RGB") for stored in batch[column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["labels"]}

    return dataset.with_transform(prepare)
