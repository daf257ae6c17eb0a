from __future__ import annotations

import asyncio
import sys

from dpo_operator.runtime import logs, options
from dpo_operator.runtime.app import ConfigurationError, Operator
from dpo_operator.runtime.login import LoginError, connection
from dpo_operator.runtime.selfcheck import selfcheck


def main() -> int:
    """Run the operator; return its exit code."""
    flags, settings = options.parse()
    if flags.selfcheck:
        return asyncio.run(selfcheck(flags))
    logs.configure(flags.log_format, flags.log_level)
    try:
        operator = Operator(flags, settings)
        connection()
    except (ConfigurationError, LoginError) as error:
        print(f"dpo-operator: {error}", file=sys.stderr)
        return 2
    asyncio.run(operator.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
