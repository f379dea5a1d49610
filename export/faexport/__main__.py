# SPDX-License-Identifier: Apache-2.0
"""The entry point of the console script and of `python -m faexport`: quiet about Ctrl-C from its first import on."""


def main() -> None:
    try:
        from faexport import cli
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
