"""Is an autoencoder worth it beyond PCA, for your table? `python examples/table_with_pandas.py FILE.csv LABEL`. Empty
entries are taken as they are. Without a file: the wines of scikit-learn."""

import sys

import pandas
from sklearn.datasets import load_wine

from dist_ae.sklearn import Autoencoder

frame = pandas.read_csv(sys.argv[1]) if sys.argv[1:] else load_wine(as_frame=True).frame
label = sys.argv[2] if sys.argv[2:] else "target"
columns = frame.drop(columns=label)
for numbers in (2, 5):
    fitted = Autoencoder(numbers, missing="mask", random_state=0).set_output(transform="pandas").fit(columns)
    print(f"{numbers} numbers: unexplained {fitted.mse_:.3f} of the variance, PCA {fitted.pca_mse_:.3f}")
codes = fitted.transform(columns)
print(codes.groupby(frame[label]).mean().round(2))
filled = fitted.inverse_transform(codes)  # in the columns' own units, with what was missing
print(pandas.DataFrame(filled, columns=columns.columns, index=columns.index).head(3).round(2).to_string())
