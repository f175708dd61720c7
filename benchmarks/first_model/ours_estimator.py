from digits import x, x_test, y, y_test

from clipless_dp import PrivateClassifier

model = PrivateClassifier(epsilon=3.0, delta=1e-4, classes=range(10)).fit(x.reshape(-1, 8, 8), y)
print(model.score(x_test.reshape(-1, 8, 8), y_test), model.epsilon_)
