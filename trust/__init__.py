"""How hard pyx_xent was tried to be broken: see __main__.py."""
