"""The one exception that speaks to the user."""


class UserError(ValueError):
    """One clear sentence: what was found, where, what was expected, what to do. The command line prints it
    and exits with 2.

    A ValueError, so that pydantic collects it with a recipe's other mistakes when settings raise it.
    """
