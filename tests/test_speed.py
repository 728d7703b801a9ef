"""The counter of operations in the speed benchmark, with a value by hand."""

import speed
import torch
from tqdm import tqdm


def test_a_cpu_counts_its_attention():
    """
    2·3 heads, 5 queries, 7 keys, 8 numbers: two products of 5·7·8 multiplications and additions, and
    2.5 times as many backward.
    """
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8)

    def attention():
        torch.nn.functional.scaled_dot_product_attention(query, key, key).sum().backward()

    with tqdm(disable=True) as bar:
        (case,) = speed.measure({"attention": attention}, "cpu", bar).values()
    assert case.operations * 1e9 == 6 * 5 * 7 * 8 * 2 * 2 * 3.5
