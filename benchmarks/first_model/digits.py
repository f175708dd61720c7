"""Scikit-learn's digits, the same rows for each library: 1437 to train on, 360 to test on, pixels in [0, 1]."""

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, labels = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split((images / 16).astype("float32"), labels, test_size=360, random_state=0)
