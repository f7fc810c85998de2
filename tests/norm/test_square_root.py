import torch

from whiten_layers.norm.square_root import square_root


def test_the_root_and_all_its_derivatives():
    factor = torch.randn(2, 4, 6, dtype=torch.float64)
    matrix = factor @ factor.mT / 6 + 0.1 * torch.eye(4, dtype=torch.float64)
    root = square_root(matrix)
    torch.testing.assert_close(root @ root, matrix)
    assert (torch.linalg.eigvalsh(root) > 0).all()

    def of_any(matrix):  # only symmetric matrices have this root
        return square_root((matrix + matrix.mT) / 2)

    matrix.requires_grad_()
    assert torch.autograd.gradcheck(of_any, matrix)
    assert torch.autograd.gradgradcheck(of_any, matrix)

    def gradient(matrix):
        return torch.autograd.grad(of_any(matrix).sin().sum(), matrix, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(gradient, matrix)  # the third


def test_a_matrix_that_is_not_positive_definite_has_none():
    matrices = torch.stack([torch.diag(torch.tensor([1.0, -1.0])), torch.eye(2)])
    first, second = square_root(matrices)
    assert first.isnan().any() and torch.equal(second, torch.eye(2))
