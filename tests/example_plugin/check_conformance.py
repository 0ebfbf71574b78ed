"""The whole test suite of a plugin author."""

from peft_suite.testing import conformance

test_conformance = conformance(plugin="example")
