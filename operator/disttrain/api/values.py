"""The named values that a loss returns beside its mean, as reports and the status have them."""

from typing import Annotated, Final

from pydantic import StringConstraints

MOST_VALUES: Final = 16
"""Names of one job."""
LONGEST_NAME: Final = 64
"""Characters."""
NAME: Final = rf"^[A-Za-z0-9_./:@+()% -]{{1,{LONGEST_NAME}}}$"

ValueName = Annotated[str, StringConstraints(max_length=LONGEST_NAME)]
"""Without the pattern: a structural schema has none for the keys of a map."""
