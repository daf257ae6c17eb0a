from dpo_monitoring.pages import REPOSITORY, generated


def main() -> None:
    for path, text in generated().items():
        target = REPOSITORY / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


if __name__ == "__main__":
    main()
