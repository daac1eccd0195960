"""`python -m tinygrad_llm` is the command `tinygrad-llm`."""

from .cli import main

if __name__ == "__main__":
    main()
