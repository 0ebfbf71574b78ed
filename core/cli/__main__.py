"""``python -m peft_suite.cli``."""

from peft_suite.cli.app import main

if __name__ == "__main__":
    main()
