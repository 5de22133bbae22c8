"""Where images come from: one file for each source, one line in `data.DATASETS` for each loader.

A loader is a function with keyword-only options, each with a type and a default, that returns an
`ImageDataset`, which `building.build_dataset` makes from arrays and checks:

    def load_letters(*, dir: str | None = None, seed: int = 0) -> ImageDataset:
        train, test = ...  # pairs (images [n, h, w, c], labels [n])
        return build_dataset(
            "letters", train, test, class_names=..., validation=Share(0.1, seed)
        )

What is wrong with the files is an `InputError` that says how to get the right ones.
"""
