"""The words shown to models: one jinja2 file each, overridable from a recipe."""

from zppo.prompts.book import PromptBook
from zppo.prompts.neutralise import Neutraliser

__all__ = ["Neutraliser", "PromptBook"]
