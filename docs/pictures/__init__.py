"""The documentation's drawings. ``make pictures`` runs :mod:`pictures.__main__`."""
