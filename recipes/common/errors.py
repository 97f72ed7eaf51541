"""The one error of the recipes that is their user's to mend."""

__all__ = ["RecipeError"]


class RecipeError(ValueError):
    """An option, a file or a launch is not as it should be; shown without a traceback."""
