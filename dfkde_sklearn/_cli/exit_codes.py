"""The exit codes of ``dfkde``."""

DONE = 0
# Of ``dfkde score --exit-code``.
NOT_ALL_NORMAL = 1
# Of ``dfkde export --check``.
LABELS_DIFFER = 1
# argparse ends with it as well, where the arguments are wrong.
FAILED = 2
# 128 plus the number of the signal, as shells report it: SIGINT and SIGPIPE.
INTERRUPTED = 130
READER_GONE = 141
