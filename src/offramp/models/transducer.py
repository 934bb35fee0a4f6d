"""A streaming transducer (arXiv 1211.3711): Emformer encoder, predictor, joiner.

The encoder is a tower without exits: `embed`, `run`, `output`. It hears a whole padded batch in
one call, or streams as they come, chunk by chunk, and writes the same for both. Its features are
normalised by fixed statistics of the training data, for a stream cannot know its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.config import Chunking, TransducerConfig
from offramp.errors import InputError
from offramp.nn.conformer import Dropout
from offramp.nn.emformer import EmformerLayer, Segments
from offramp.nn.predictors import LSTMPredictor, StatelessPredictor
from offramp.nn.stream_state import StreamState
from offramp.nn.subsampling import Halving, Stack

_LEAST_VARIANCE = 1e-5  # of features that never vary


def emformer_rnnt_base() -> TransducerConfig:
    """The public reference of this kind (torchaudio's of that name): 76,738,049 parameters.

    Chunks of 160 ms, 1.2 s of left and 40 ms of right context; 4,096 pieces and the blank.
    """
    return TransducerConfig(
        d_model=512,
        num_layers=20,
        num_heads=8,
        d_ff=2048,
        vocab_size=4097,
        d_predictor=512,
        d_joint=1024,
        chunking=Chunking(chunk=4, left_context=30, right_context=1),
        predictor="lstm",
        predictor_layers=3,
        blank_id=4096,
        dropout=0.1,
    )


class FeatureNorm(nn.Module):
    """(features - mean) * inverse_std, the same for every utterance; both are buffers [F].

    Until `measure` or a checkpoint fills them they are 0 and 1.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_mels))
        self.register_buffer("inverse_std", torch.ones(num_mels))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.inverse_std

    @torch.no_grad()
    def measure(self, utterances: Iterable[Tensor]) -> None:
        """Take mean and deviation per filter over all frames of `utterances`, each [T, F].

        InputError: there is no frame, or one is not finite.
        """
        count, total = 0, torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for features in utterances:
            frames = features.to(total)
            count += len(frames)
            total += frames.sum(dim=0)
            squares += frames.square().sum(dim=0)
        if count == 0 or not bool(squares.isfinite().all()):
            raise InputError(
                f"cannot measure features over {count} frames; give at least one frame, and only "
                "numbers that are finite"
            )
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=_LEAST_VARIANCE)
        self.mean.copy_(mean)
        self.inverse_std.copy_(variance.rsqrt())


@dataclass(frozen=True)
class EmformerState:
    """A batch part way up the tower.

    h: [B, N, S + R, D], N chunks with copies of what follows each. lengths: int64 [B], true frames
    of these chunks. layer: how many layers ran. memory: [B, N, D], summaries for the next layer.
    stream: whose caches the layers read and bring up to date.
    """

    h: Tensor
    layer: int
    lengths: Tensor
    segments: Segments
    memory: Tensor | None
    stream: StreamState | None


class EmformerEncoder(nn.Module):
    """Log-mel features, not normalised, to the encoder's side of the joiner.

    Whole: `forward`, or `embed`, `run`, `output`. Streaming: `push` and `finish` in the scope of
    `streaming`. Chunking may differ from call to call; the configuration's is the default.
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.d_model
        self.feature_norm = FeatureNorm(config.num_mels)
        self.input: Stack | Halving = (
            Stack(config) if config.subsampling == "stack" else Halving(config)
        )
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(EmformerLayer(config) for _ in range(config.num_layers))
        self.output_projection = nn.Linear(D, config.d_joint)
        self.output_norm = nn.LayerNorm(config.d_joint)

    @property
    def device(self) -> torch.device:
        return self.output_norm.weight.device  # compression leaves norms alone

    @property
    def dtype(self) -> torch.dtype:
        return self.output_norm.weight.dtype

    # -- the tower ---------------------------------------------------------------------------

    def embed(
        self, features: Tensor, lengths: Tensor, chunking: Chunking | None = None
    ) -> EmformerState:
        """features [B, T, F], of which the first `lengths` [B] frames of a row are real.

        Frames that do not fill a frame of the tower are filled up with zeros. Whatever stands in
        the padding, NaN included, changes nothing.
        """
        chunking = chunking or self.config.chunking
        lengths = lengths.to(features.device)
        self._check_features(features, lengths, 1)
        count = -(-self.config.output_frames(int(lengths.max())) // chunking.chunk)
        return self._start(features, lengths, chunking, count)

    def run(self, state: EmformerState, start: int, stop: int) -> EmformerState:
        """Layers `start` to `stop` - 1, counted from 0; `start` is where `state` stopped."""
        if not (start == state.layer and start <= stop <= self.config.num_layers):
            raise InputError(
                f"layers {start} to {stop} were asked for; allowed: from {state.layer}, where the "
                f"state stopped, to at most {self.config.num_layers}"
            )
        h, memory = state.h, state.memory
        for index in range(start, stop):
            cache = None if state.stream is None else state.stream.layer(index)
            h, memory = self.layers[index](h, memory, state.segments, cache)
        return replace(state, h=h, memory=memory, layer=stop)

    def output(self, state: EmformerState) -> Tensor:
        """[B, T', J] of the true frames, after all layers; copies of later frames fall away."""
        if state.layer != self.config.num_layers:
            raise InputError(
                f"{state.layer} layers ran; the output follows all {self.config.num_layers}"
            )
        frames = state.h[:, :, : state.segments.chunking.chunk].flatten(1, 2)
        frames = frames[:, : int(state.lengths.max())]
        output: Tensor = self.output_norm(self.output_projection(frames))
        return output

    def forward(
        self, features: Tensor, lengths: Tensor, chunking: Chunking | None = None
    ) -> tuple[Tensor, Tensor]:
        """features [B, T, F], lengths [B] -> ([B, T', J], int64 [B] true frames of T')."""
        state = self.embed(features, lengths, chunking)
        state = self.run(state, 0, self.config.num_layers)
        return self.output(state), state.lengths

    # -- streams -----------------------------------------------------------------------------

    @contextmanager
    def streaming(self, batch_size: int, chunking: Chunking | None = None) -> Iterator[StreamState]:
        """The state of `batch_size` streams that advance together, for as long as the scope."""
        chunking = chunking or self.config.chunking
        state = StreamState(self.config, chunking, batch_size, self.device, self.dtype)
        try:
            yield state
        finally:
            state.close()

    @torch.inference_mode()
    def push(
        self, features: Tensor, state: StreamState, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """features [B, n, F], the next of each stream -> ([B, t, J], int64 [B] true frames of t).

        t is 0 until a chunk and its right context are full. lengths: int64 [B], how many of the n
        frames are real (default: all); a row that gets fewer has ended.
        """
        state.check_open()
        if lengths is None:
            lengths = torch.full((len(features),), features.shape[1])
        lengths = lengths.to(state.received)
        self._check_features(features, lengths, 0)
        if len(features) != state.batch_size or bool((state.ended & (lengths > 0)).any()):
            raise InputError(
                f"features for rows {lengths.tolist()} came to {state.batch_size} streams of which "
                f"{state.ended.nonzero().flatten().tolist()} have ended; open another state"
            )
        state.pending = torch.cat((state.pending, features.to(state.pending)), dim=1)
        state.received += lengths
        state.ended |= lengths < features.shape[1]
        heard = []
        needed = self.config.history + state.chunking.frames * self.config.time_reduction
        while state.pending.shape[1] >= needed:
            heard.append(self._advance(state))
        return self._joined(heard, state)

    @torch.inference_mode()
    def finish(self, state: StreamState) -> tuple[Tensor, Tensor]:
        """What still waits, once no more features come: as `push`."""
        state.check_open()
        state.ended.fill_(True)
        total, heard = self.config.output_frames(int(state.received.max())), []
        while state.chunks * state.chunking.chunk < total:
            heard.append(self._advance(state))
        return self._joined(heard, state)

    def _advance(self, state: StreamState) -> tuple[Tensor, Tensor]:
        """Hear one chunk, as far as its features have come."""
        cfg, S = self.config, state.chunking.chunk
        used = S * cfg.time_reduction
        lengths = state.received - state.chunks * used
        tower = self._start(state.pending, lengths, state.chunking, 1, state)
        tower = self.run(tower, 0, cfg.num_layers)
        state.pending = state.pending[:, used:].clone()  # a view would keep the whole alive
        state.chunks += 1
        return self.output(tower), tower.lengths

    def _joined(
        self, heard: list[tuple[Tensor, Tensor]], state: StreamState
    ) -> tuple[Tensor, Tensor]:
        """One output of several chunks. A chunk is whole unless every row ends there."""
        nothing = state.pending.new_zeros(state.batch_size, 0, self.config.d_joint)
        lengths = torch.zeros_like(state.received)
        outputs = torch.cat([nothing, *(output for output, _ in heard)], dim=1)
        return outputs, sum((n for _, n in heard), start=lengths)

    # -- one call ----------------------------------------------------------------------------

    def _start(
        self,
        features: Tensor,
        lengths: Tensor,
        chunking: Chunking,
        count: int,
        stream: StreamState | None = None,
    ) -> EmformerState:
        """`count` chunks from features [B, T, F], of which those before `lengths` [B] are real.

        In a stream, features begin with the history of the first chunk, which is not in `lengths`.
        """
        cfg, S, history = self.config, chunking.chunk, self.config.history
        first = 0 if stream is None else stream.chunks
        before = history if stream is None else 0
        wanted = history + (count * S + chunking.right_context) * cfg.time_reduction
        features = F.pad(features, (0, 0, before, wanted - before - features.shape[1]))  # or cut
        at = torch.arange(-history, wanted - history, device=features.device)
        real = (at < lengths[:, None]) & ((at >= 0) | (first > 0))
        features = self.feature_norm(features.to(self.dtype))
        features = features.masked_fill(~real[:, :, None], 0.0)
        frames = self.dropout(self.input(features))
        h = frames.unfold(1, chunking.frames, S).transpose(2, 3).contiguous()
        frame_lengths = -torch.div(-lengths, cfg.time_reduction, rounding_mode="floor")
        chunks = range(first, first + count)
        segments = Segments.of(cfg, chunking, frame_lengths + first * S, chunks, self.dtype)
        memory = h[:, :, :S].mean(dim=2) if chunking.memory else None
        heard = frame_lengths.clamp(0, count * S)
        return EmformerState(h, 0, heard, segments, memory, stream)

    def _check_features(self, features: Tensor, lengths: Tensor, least: int) -> None:
        num_mels = self.config.num_mels
        if features.ndim != 3 or features.shape[2] != num_mels or len(features) == 0:
            raise InputError(
                f"features have shape {list(features.shape)}; they must be [batch, frames, "
                f"{num_mels}], with one length per row"
            )
        fit = len(lengths) == len(features) and bool(
            ((lengths >= least) & (lengths <= features.shape[1])).all()
        )
        if not fit:
            raise InputError(
                f"lengths are {lengths.tolist()} for features {list(features.shape)}; each row "
                f"needs {least} to {features.shape[1]} frames"
            )


def _normalised(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Joiner(nn.Module):
    """ReLU of the sum of both sides, then a matrix to the tokens.

    Encoder and predictor outputs [..., J] are broadcast against each other. With a factorised
    blank (HAT, arXiv 2003.07705) the blank has its own scorer, p(blank) = sigmoid(blank_logit),
    and the labels share the rest: a search that trusts the blank need not score the labels at all
    (arXiv 2211.00896).
    """

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        J, V = config.d_joint, config.vocab_size
        self.blank_id = config.blank_id
        self.blank = nn.Linear(J, 1) if config.factorised_blank else None
        self.tokens = nn.Linear(J, V - 1 if config.factorised_blank else V)

    def forward(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """Logits [..., V], whose softmax is the distribution, of either kind of blank."""
        return self._logits(encoder_out, predictor_out, None)

    def log_probs(
        self, encoder_out: Tensor, predictor_out: Tensor, blank_logit: Tensor | None = None
    ) -> Tensor:
        """[..., V], normalised; float32, or float64 if the model is.

        blank_logit: [...], what the method of that name gave for the same, so that the blank's own
        scorer need not run again.
        """
        return _normalised(self._logits(encoder_out, predictor_out, blank_logit))

    def blank_logit(self, encoder_out: Tensor, predictor_out: Tensor) -> Tensor:
        """[...], whose sigmoid is the probability of blank, without a look at the labels."""
        if self.blank is None:
            raise InputError(
                "this joiner scores the blank among the labels; blank_logit needs a model with "
                "factorised_blank"
            )
        logit: Tensor = self.blank(F.relu(encoder_out + predictor_out))
        return logit[..., 0]

    def _logits(
        self, encoder_out: Tensor, predictor_out: Tensor, blank_logit: Tensor | None
    ) -> Tensor:
        h = F.relu(encoder_out + predictor_out)
        logits: Tensor = self.tokens(h)
        if self.blank is None:
            return logits
        above = self.blank(h) if blank_logit is None else blank_logit[..., None]
        # Above the labels' logsumexp by b, the blank has the probability sigmoid(b).
        blank = logits.logsumexp(dim=-1, keepdim=True) + above
        labels = logits.tensor_split([self.blank_id], dim=-1)
        return torch.cat((labels[0], blank, labels[1]), dim=-1)


class Transducer(nn.Module):
    """Encoder, predictor and joiner, and optionally a CTC head on the encoder."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = EmformerEncoder(config)
        self.predictor: LSTMPredictor | StatelessPredictor = (
            LSTMPredictor(config) if config.predictor == "lstm" else StatelessPredictor(config)
        )
        self.joiner = Joiner(config)
        self.ctc_head = nn.Linear(config.d_joint, config.vocab_size) if config.ctc_head else None

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    def streaming(
        self, batch_size: int, chunking: Chunking | None = None
    ) -> AbstractContextManager[StreamState]:
        """The scope of `batch_size` streams; see `EmformerEncoder.streaming`."""
        return self.encoder.streaming(batch_size, chunking)

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """[B, T', J] -> [B, T', V], normalised, of the head that helps training."""
        if self.ctc_head is None:
            raise InputError("this transducer has no CTC head; set ctc_head in its configuration")
        return _normalised(self.ctc_head(encoder_out))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Norms 1, biases 0, embeddings N(0, 1), matrices Xavier-uniform; kernels by their reach.

        What is added in a layer of the encoder is small at first: every layer ends in a norm, and
        ten layers that each halve what comes from below would hide the audio from the top. The
        statistics of the features stay as they are.
        """
        generator = torch.Generator().manual_seed(seed)
        added = (".attention.output.weight", ".convolution.output.weight", ".down.weight")
        share = (len(added) * self.config.num_layers) ** -0.5
        for name, p in self.named_parameters():
            if name.endswith("embedding.weight"):
                p.normal_(generator=generator)
            elif p.ndim == 2:
                gain = share if name.endswith(added) else 1.0
                nn.init.xavier_uniform_(p, gain, generator=generator)
            elif p.ndim > 2:
                bound = p[0].numel() ** -0.5
                p.uniform_(-bound, bound, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
