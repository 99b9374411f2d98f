"""Patterns: which entries of a weight form a group. A new pattern is one file here and one line below."""

from .base import Pattern
from .block import Block
from .connectivity import Expander, Radix, RandomFanIn, StaticElement
from .element import Element
from .nm import NM
from .row_column import Column, Row
from .structured import AssignedLines, Head, HeadNeuron, KVHead, KVHeadNeuron, Layer, Lines, Neuron, Structure
from .transposed import Transposed

__all__ = [
    "NM",
    "AssignedLines",
    "Block",
    "Column",
    "Element",
    "Expander",
    "Head",
    "HeadNeuron",
    "KVHead",
    "KVHeadNeuron",
    "Layer",
    "Lines",
    "Neuron",
    "Pattern",
    "Radix",
    "RandomFanIn",
    "Row",
    "StaticElement",
    "Structure",
    "Transposed",
]
