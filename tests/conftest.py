"""What all tests share."""

from hypothesis import settings

# By its default an example that takes more than 200 ms is a failure: on a machine with other work that is chance. Whatever else was chosen
# stays, such as the examples that are the same each time in CI.
settings.register_profile("disttrain", settings.default, deadline=None)
settings.load_profile("disttrain")
