"""python -m pyx_xent: print show_config()."""

from ._config import show_config

for name, value in show_config().items():
    print(f"{name:20}{', '.join(value) if isinstance(value, list) else value}")
