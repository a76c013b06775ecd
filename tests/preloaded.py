"""Imported last by the server that ranks are forked from: does once what every rank would repeat."""

from megatron_rpp.config import cli
from megatron_rpp.runtime.session import freeze_heap

cli.parse([])  # reads the docstrings of all settings
freeze_heap()  # as the programs do; every world that ends collects garbage
