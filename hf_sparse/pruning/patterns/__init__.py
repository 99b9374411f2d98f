"""Patterns: which entries of a weight form a group. A new pattern is one file here and one line below."""

from .base import Pattern
from .block import Block
from .connectivity import Expander, Radix, RandomFanIn, StaticElement
from .element import Element
from .kernel_position import KernelPosition
from .lines import AssignedLines, Lines
from .nm import NM
from .on_matrix import OnMatrix
from .row_column import Column, Row
from .structured import Filter, Head, HeadNeuron, KVHead, KVHeadNeuron, Layer, Neuron, Structure

__all__ = [
    "NM",
    "AssignedLines",
    "Block",
    "Column",
    "Element",
    "Expander",
    "Filter",
    "Head",
    "HeadNeuron",
    "KVHead",
    "KVHeadNeuron",
    "KernelPosition",
    "Layer",
    "Lines",
    "Neuron",
    "OnMatrix",
    "Pattern",
    "Radix",
    "RandomFanIn",
    "Row",
    "StaticElement",
    "Structure",
]
