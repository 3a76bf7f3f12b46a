import torch

from comfy_g2rpo.rewards import Rule
from comfy_g2rpo.scoring import Scorer, to_8_bit

BRIGHTNESS = Rule("brightness", lambda images, prompts: images.mean((1, 2, 3)), True)
LENGTH = Rule("length", lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]), True)


def decode(latents):
    return latents.sigmoid().permute(0, 2, 3, 1)


def test_scores_land_at_their_prompt_and_image():
    scorer = Scorer(decode, [BRIGHTNESS, LENGTH], ["ab", "abcd"], 3, batch=2)
    latents = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scorer([0, 1, 1], [2, 0, 1], latents)
    assert scorer.scores[1].isnan().sum() == 3 and scorer.scores[1, 0, 2] == 2 and scorer.scores[1, 1, 0] == 4
    assert torch.equal(scorer.scores[0, 1, 1], to_8_bit(decode(latents[2:])).mean())


def test_only_wanted_pictures_are_kept():
    scorer = Scorer(decode, [BRIGHTNESS], ["a", "b"], 1, keep={1})
    scorer([0, 1], [0, 0], torch.zeros(2, 3, 4, 4))
    assert list(scorer.pictures) == [(1, 0)] and scorer.pictures[1, 0].shape == (4, 4, 3)


def test_what_is_judged_is_what_a_file_would_hold():
    images = to_8_bit(torch.tensor([-0.1, 0.5, 1.2]))
    assert torch.equal(images, torch.tensor([0.0, 128 / 255, 1.0]))


def test_a_batch_that_is_not_finite_is_not_judged():
    scorer = Scorer(lambda latents: latents.permute(0, 2, 3, 1), [BRIGHTNESS], ["a"], 1)
    scorer([0], [0], torch.full((1, 3, 4, 4), torch.nan))
    assert scorer.scores.isnan().all()


def test_the_check_runs_before_every_batch():
    count = []
    Scorer(decode, [BRIGHTNESS], ["a"] * 3, 1, batch=1, check=lambda: count.append(1))([0, 1, 2], [0, 0, 0], torch.zeros(3, 3, 4, 4))
    assert len(count) == 3
