"""The error that a user of the command line can mend.

Attributes:
  InputError: a file, a field or a flag is wrong; the message names it.
"""


class InputError(ValueError):
  """What the user gave cannot be used; the message names it and the remedy.

  The command line prints the message as one sentence and exits with code 2.
  """
