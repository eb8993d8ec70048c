"""What a server takes on, and how an answer is written."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is refused, so that no request takes the machine from the others.

    Attributes:
        body: bytes of a request, and of one picture.
        images: pictures of a conversation.
        tokens: of an answer.
        queue: requests that wait.
        batch: questions that are answered together.
    """

    body: int = 20 * 2**20
    images: int = 8
    tokens: int = 512
    queue: int = 64
    batch: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value}: a limit must be at least 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How an answer is written; questions of one batch share it.

    Attributes:
        injections: False leaves every group of the plan out, of the LLM and of the tower.
        temperature: 0 is greedy.
        seed: of a sampled answer; None draws one.
    """

    injections: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:  # below, logits would overflow
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy), or from 0.01 to 2.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0, and at most 1 (all tokens).")
        if self.top_p < 1 and not self.sampled:
            raise ValueError(f"top_p={self.top_p}: without a temperature answers are greedy. Give temperature, too.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be a whole number from 0 to 2**63 - 1.")

    @property
    def sampled(self) -> bool:
        return self.temperature > 0
