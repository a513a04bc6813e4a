"""Classes of transformers that write attention out by hand: which of them attnkit computes.

`enable` finds such classes by their code and watches them; `attnkit.interop.torch.fuse` reads what
they do. Here is written down which were compared with themselves, outputs and all gradients, and
which stay as they are written, with the reason. What is in neither table is watched all the same,
and what is no attention is computed as written: a table is a record, not a condition.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from attnkit.interop.transformers.switching import TESTED

__all__ = ["LEFT", "TESTED", "WRITTEN", "stands"]

WRITTEN: dict[str, tuple[str, ...]] = {
    "aimv2": ("Aimv2AttentionPoolingHead",),
    "bark": ("BarkSelfAttention",),
    "big_bird": ("BigBirdSelfAttention",),
    "bigbird_pegasus": ("BigBirdPegasusSelfAttention",),
    "blip": ("BlipAttention",),
    "blip_text": ("BlipTextSelfAttention",),
    "bloom": ("BloomAttention",),
    "bros": ("BrosSelfAttention",),
    "canine": ("CanineSelfAttention",),
    "chameleon": ("ChameleonVQVAEEncoderAttnBlock",),
    "clap": ("ClapAudioSelfAttention",),
    "clvp": ("ClvpSelfAttention",),
    "codegen": ("CodeGenAttention",),
    "convbert": ("ConvBertSelfAttention",),
    "cpmant": ("CpmAntAttention",),
    "cvt": ("CvtSelfAttention",),
    "dab_detr": (
        "DabDetrAttention",
        "DetrAttention",
    ),
    "data2vec_vision": ("Data2VecVisionSelfAttention",),
    "deberta": ("DisentangledSelfAttention",),
    "deberta_v2": ("DisentangledSelfAttention",),
    "deepseek_ocr2": (
        "DeepseekOcr2SamVisionAttention",
        "DeepseekOcr2SamVisionSdpaAttention",
    ),
    "donut_swin": ("DonutSwinSelfAttention",),
    "esmfold": ("EsmFoldSelfAttention",),
    "evolla": ("EvollaSequenceCompressorAttention",),
    "falcon": ("FalconAttention",),
    "fastspeech2_conformer": ("FastSpeech2ConformerAttention",),
    "flaubert": ("MultiHeadAttention",),
    "flava": ("FlavaSelfAttention",),
    "fsmt": ("Attention",),
    "funnel": ("FunnelRelMultiheadAttention",),
    "git": ("GitSelfAttention",),
    "glpn": ("GLPNEfficientSelfAttention",),
    "got_ocr2": ("GotOcr2VisionAttention",),
    "gpt_neo": ("GPTNeoSelfAttention",),
    "gpt_neox_japanese": ("GPTNeoXJapaneseAttention",),
    "gptj": ("GPTJAttention",),
    "granite_speech": ("GraniteSpeechConformerAttention",),
    "granite_speech_plus": ("GraniteSpeechPlusConformerAttention",),
    "grounding_dino": ("GroundingDinoMultiheadAttention",),
    "groupvit": ("GroupViTAttention",),
    "hiera": ("HieraMaskUnitAttention",),
    "ibert": ("IBertSelfAttention",),
    "imagegpt": ("ImageGPTAttention",),
    "informer": ("InformerProbSparseAttention",),
    "inkling2": ("Inkling2BlockAttentionResidual",),
    "janus": ("JanusVQVAEAttnBlock",),
    "layoutlmv2": ("LayoutLMv2SelfAttention",),
    "layoutlmv3": ("LayoutLMv3SelfAttention",),
    "led": ("LEDDecoderAttention",),
    "levit": (
        "LevitAttention",
        "LevitAttentionSubsample",
    ),
    "lilt": ("LiltSelfAttention",),
    "longt5": (
        "LongT5LocalAttention",
        "LongT5TransientGlobalAttention",
    ),
    "luke": ("LukeSelfAttention",),
    "lxmert": ("LxmertAttention",),
    "mask2former": ("Mask2FormerAttention",),
    "maskformer_swin": ("MaskFormerSwinSelfAttention",),
    "megatron_bert": ("MegatronBertSelfAttention",),
    "mgp_str": ("MgpstrAttention",),
    "mm_grounding_dino": ("MMGroundingDinoMultiheadAttention",),
    "mobilevit": ("MobileViTSelfAttention",),
    "mpnet": ("MPNetSelfAttention",),
    "mpt": ("MptAttention",),
    "mvp": ("MvpAttention",),
    "nystromformer": ("NystromformerSelfAttention",),
    "omdet_turbo": ("OmDetTurboMultiheadAttention",),
    "oneformer": (
        "OneFormerAttention",
        "OneFormerTextMapperAttention",
    ),
    "pegasus_x": ("PegasusXGlobalLocalAttention",),
    "perceiver": ("PerceiverSelfAttention",),
    "pp_doclayout_v2": ("PPDocLayoutV2ReadingOrderSelfAttention",),
    "pp_formulanet": ("PPFormulaNetVisionAttention",),
    "prophetnet": (
        "ProphetNetAttention",
        "ProphetNetNgramSelfAttention",
    ),
    "pvt": ("PvtEfficientSelfAttention",),
    "pvt_v2": ("PvtV2SelfAttention",),
    "rembert": ("RemBertSelfAttention",),
    "roformer": ("RoFormerSelfAttention",),
    "sam": (
        "SamVisionAttention",
        "SamVisionSdpaAttention",
    ),
    "sam_hq": (
        "SamHQVisionAttention",
        "SamHQVisionSdpaAttention",
    ),
    "seggpt": ("SegGptAttention",),
    "slanext": ("SLANeXtVisionAttention",),
    "speecht5": ("SpeechT5Attention",),
    "superglue": ("SuperGlueSelfAttention",),
    "swin2sr": ("Swin2SRSelfAttention",),
    "swinv2": ("Swinv2SelfAttention",),
    "table_transformer": ("TableTransformerAttention",),
    "tapas": ("TapasSelfAttention",),
    "timesformer": ("TimesformerSelfAttention",),
    "trocr": ("TrOCRAttention",),
    "tvp": ("TvpAttention",),
    "unlimited_ocr": (
        "UnlimitedOcrSamVisionAttention",
        "UnlimitedOcrSamVisionSdpaAttention",
    ),
    "vilt": ("ViltSelfAttention",),
    "visual_bert": ("VisualBertSelfAttention",),
    "vitdet": ("VitDetAttention",),
    "vits": ("VitsAttention",),
    "xglm": ("XGLMAttention",),
    "xlm": ("MultiHeadAttention",),
    "xlnet": ("XLNetRelativeAttention",),
    "zoedepth": ("ZoeDepthMultiheadAttention",),
}
"""The classes of each modeling file that became calls of attnkit, in the versions `TESTED`."""

LEFT: dict[str, str] = {
    "big_bird.BigBirdBlockSparseAttention": "weights of several products are joined",
    "bigbird_pegasus.BigBirdPegasusBlockSparseAttention": "weights of several products are joined",
    "conditional_detr.ConditionalDetrMHAttentionMap": "weights without values: a map of masks",
    "dab_detr.DabDetrMHAttentionMap": "weights without values: a map of masks",
    "data2vec_vision.Data2VecVisionSdpaSelfAttention": "watched, but not compared",
    "detr.DetrMHAttentionMap": "weights without values: a map of masks",
    "esmfold.EsmFoldInvariantPointAttention": "scores are distances of points in space",
    "esmfold2.EsmFold2RowAttentionPooling": "one score per row, from a projection",
    "evolla.EvollaSequenceAlignerCrossAttention": "watched, but not compared",
    "gemma3n.Gemma3nAudioAttention": "tanh of scores with a relative bias already in them",
    "gemma4.Gemma4AudioAttention": "tanh of scores with a relative bias already in them",
    "grounding_dino.GroundingDinoBiMultiHeadAttention": "watched, but not compared",
    "groupvit.GroupViTAssignAttention": "a hard choice of the largest weight",
    "led.LEDEncoderSelfAttention": "scores of sliding chunks are padded into diagonals",
    "longformer.LongformerSelfAttention": "scores of sliding chunks are padded into diagonals",
    "maskformer.MaskFormerDetrMHAttentionMap": "weights without values: a map of masks",
    "mgp_str.MgpstrA3Module": "scores are those of a convolution",
    "mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention": "watched, but not compared",
    "openai.Attention": "scores are masked by a product with 0 and 1, cell by cell",
    "slanet.SLANetAttentionGRUCell": "additive attention: tanh of a sum",
    "slanext.SLANeXtAttentionGRUCell": "additive attention: tanh of a sum",
    "swiftformer.SwiftFormerEfficientAdditiveAttention": "additive attention: one score per token",
}
"""``file.Class`` of attention that stays as it is written, and why."""


def stands(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, what is known) of the modules of a model that write attention out.

    >>> from torch import nn
    >>> list(stands(nn.Linear(2, 2)))
    []
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            file = kind.__module__.rpartition(".modeling_")[2]
            if kind.__name__ in WRITTEN.get(file, ()):
                yield name, f"compared with itself in transformers {TESTED[0]} to {TESTED[1]}"
            elif f"{file}.{kind.__name__}" in LEFT:
                yield name, LEFT[f"{file}.{kind.__name__}"]
