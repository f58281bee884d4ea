"""scikit-learn by joblib, XGBoost and LightGBM."""

from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import xgboost
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.neighbors import KNeighborsRegressor

from tests.engines.programs.common import floats, main

ROWS, COLUMNS = 20_000, 20


def _data() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    return rows, rows[:, 0] * rows[:, 1] + random.standard_normal(ROWS, dtype=np.float32)


def build(directory: Path, divide: int) -> None:
    """One model of each."""
    rows, target = (each[: ROWS // divide] for each in _data())
    many = np.random.default_rng(1).standard_normal((200_000 // divide, 64))
    neighbours = KNeighborsRegressor(algorithm="brute").fit(many, many[:, 0])
    joblib.dump(neighbours, directory / "neighbours.joblib")
    forest = ExtraTreesRegressor(n_estimators=20, n_jobs=1, random_state=0).fit(rows, target)
    joblib.dump(forest, directory / "forest.joblib")
    boosted = xgboost.train({"max_depth": 10, "nthread": 1}, xgboost.DMatrix(rows, target), 200)
    boosted.save_model(directory / "boosted.ubj")
    light = lightgbm.train({"num_leaves": 255, "verbose": -1, "num_threads": 1}, lightgbm.Dataset(rows, target), 200)
    light.save_model(directory / "light.txt")


def forest(directory: Path) -> tuple[object, bytes]:
    """scikit-learn, whose arrays joblib maps."""
    model = joblib.load(directory / "forest.joblib", mmap_mode="r")
    return model, floats(model.predict(_data()[0][:64]).tolist())


def neighbours(directory: Path) -> tuple[object, bytes]:
    """scikit-learn again, with one large array."""
    model = joblib.load(directory / "neighbours.joblib", mmap_mode="r")
    return model, floats(model.predict(np.ones((4, 64))).tolist())


def boosted(directory: Path) -> tuple[object, bytes]:
    """XGBoost."""
    model = xgboost.Booster(model_file=str(directory / "boosted.ubj"))
    return model, floats(model.predict(xgboost.DMatrix(_data()[0][:64])).tolist())


def light(directory: Path) -> tuple[object, bytes]:
    """LightGBM."""
    model = lightgbm.Booster(model_file=str(directory / "light.txt"))
    return model, floats(np.asarray(model.predict(_data()[0][:64])).tolist())


if __name__ == "__main__":
    main(
        build,
        {
            "neighbours": ("neighbours.joblib", neighbours),
            "forest": ("forest.joblib", forest),
            "xgboost": ("*.ubj", boosted),
            "lightgbm": ("*.txt", light),
        },
    )
