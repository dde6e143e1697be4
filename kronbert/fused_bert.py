"""The fused blocks of BERT, RoBERTa, XLM-RoBERTa and ELECTRA: one arithmetic under four names."""

from __future__ import annotations

from transformers.models.bert import modeling_bert as bert
from transformers.models.electra import modeling_electra as electra
from transformers.models.roberta import modeling_roberta as roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

from .fused_encoder import (
    FusedEmbeddings,
    FusedLayer,
    FusedOutput,
    FusedPaddedEmbeddings,
    FusedSelfAttention,
)


class FusedBertEmbeddings(FusedEmbeddings, bert.BertEmbeddings):
    pass


class FusedBertSelfAttention(FusedSelfAttention, bert.BertSelfAttention):
    eager = staticmethod(bert.eager_attention_forward)


class FusedBertSelfOutput(FusedOutput, bert.BertSelfOutput):
    pass


class FusedBertOutput(FusedOutput, bert.BertOutput):
    pass


class FusedBertLayer(FusedLayer, bert.BertLayer):
    expands = bert.BertIntermediate
    contracts = (bert.BertOutput, FusedBertOutput)


class FusedRobertaEmbeddings(FusedPaddedEmbeddings, roberta.RobertaEmbeddings):
    pass


class FusedRobertaSelfAttention(FusedSelfAttention, roberta.RobertaSelfAttention):
    eager = staticmethod(roberta.eager_attention_forward)


class FusedRobertaSelfOutput(FusedOutput, roberta.RobertaSelfOutput):
    pass


class FusedRobertaOutput(FusedOutput, roberta.RobertaOutput):
    pass


class FusedRobertaLayer(FusedLayer, roberta.RobertaLayer):
    expands = roberta.RobertaIntermediate
    contracts = (roberta.RobertaOutput, FusedRobertaOutput)


class FusedXLMRobertaEmbeddings(FusedPaddedEmbeddings, xlm_roberta.XLMRobertaEmbeddings):
    pass


class FusedXLMRobertaSelfAttention(FusedSelfAttention, xlm_roberta.XLMRobertaSelfAttention):
    eager = staticmethod(xlm_roberta.eager_attention_forward)


class FusedXLMRobertaSelfOutput(FusedOutput, xlm_roberta.XLMRobertaSelfOutput):
    pass


class FusedXLMRobertaOutput(FusedOutput, xlm_roberta.XLMRobertaOutput):
    pass


class FusedXLMRobertaLayer(FusedLayer, xlm_roberta.XLMRobertaLayer):
    expands = xlm_roberta.XLMRobertaIntermediate
    contracts = (xlm_roberta.XLMRobertaOutput, FusedXLMRobertaOutput)


class FusedElectraEmbeddings(FusedEmbeddings, electra.ElectraEmbeddings):
    pass


class FusedElectraSelfAttention(FusedSelfAttention, electra.ElectraSelfAttention):
    eager = staticmethod(electra.eager_attention_forward)


class FusedElectraSelfOutput(FusedOutput, electra.ElectraSelfOutput):
    pass


class FusedElectraOutput(FusedOutput, electra.ElectraOutput):
    pass


class FusedElectraLayer(FusedLayer, electra.ElectraLayer):
    expands = electra.ElectraIntermediate
    contracts = (electra.ElectraOutput, FusedElectraOutput)
